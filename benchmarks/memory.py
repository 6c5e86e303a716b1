"""What a step of the 4-layer language model needs, counted on tensors without numbers: no GPU, a minute of a CPU.

    python benchmarks/memory.py

Eager mode. An allocator rounds up and leaves gaps, and the context of CUDA is not counted. bf16 is autocast with the
frozen target cast once; `checkpointed` computes the blocks of the ci function twice (runtime.checkpoint_activations).
"""

from __future__ import annotations

from gpu_cases import build, cast_target, checkpointed

from pdlightning.rehearsal.sizes import Sizes, sizes_of

COLUMNS = ["batch", "precision", "checkpointed", "parameters, moments", "sources", "gradients", "rest", "together, GB",
           "TFLOP"]  # fmt: skip


def row(case: str, precision: str, sizes: Sizes, *, twice: bool) -> list[str]:
    assert sizes.step is not None, sizes.reason
    held = sizes.target_bytes + sizes.parameter_bytes + sizes.optimizer_bytes
    bytes_of = (held, sizes.step.sources, sizes.parameter_bytes, sizes.step.activations, sizes.together)
    batch = "64 x 512" if case == "lm-64" else "8 x 512"
    gigabytes = [f"{n / 1e9:.1f}" for n in bytes_of]
    return [batch, precision, "yes" if twice else "no", *gigabytes, f"{sizes.step.flops / 1e12:.1f}"]


def main() -> None:
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for case in ("lm", "lm-64"):
        decomposition, batch = build(case, compile=False, small=False)
        for precision in ("32-true", "bf16-mixed"):
            if precision == "bf16-mixed":
                cast_target(decomposition)
            for twice in (False, True):
                checkpointed(decomposition, twice)
                sizes = sizes_of(decomposition, batch, precision=precision)
                print(f"| {' | '.join(row(case, precision, sizes, twice=twice))} |", flush=True)


if __name__ == "__main__":
    main()
