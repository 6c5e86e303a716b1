"""What a step of a language model needs: counted without a GPU, or measured on a CPU.

    python benchmarks/memory.py               # of the 4-layer model, on tensors without numbers: two minutes
    python benchmarks/memory.py --measure     # of a smaller one, resident memory and time: ten minutes

Counted is the eager step; an allocator rounds up and leaves gaps, and the context of CUDA is not in it. bf16 is
autocast with the frozen target cast once. `twice` is runtime.checkpoint_activations.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from gpu_cases import build, cast_target, measure

from pdlightning.rehearsal.sizes import Sizes, sizes_of

COUNTED = [
    "batch",
    "precision",
    "twice",
    "parameters, moments",
    "sources",
    "gradients",
    "rest",
    "together, GB",
    "TFLOP",
]
MEASURED = ["precision", "mode", "peak GB", "s a step"]


def counted(case: str, precision: str, *, twice: bool) -> list[str]:
    decomposition, batch = build(case, compile=False, small=False, twice=twice)
    if precision == "bf16-mixed":
        cast_target(decomposition)
    sizes: Sizes = sizes_of(decomposition, batch, precision=precision)
    assert sizes.step is not None, sizes.reason
    held = sizes.target_bytes + sizes.parameter_bytes + sizes.optimizer_bytes
    numbers = (held, sizes.step.sources, sizes.parameter_bytes, sizes.step.activations, sizes.together)
    words = ["64 x 512" if case == "lm-64" else "8 x 512", precision, "yes" if twice else "no"]
    return [*words, *(f"{n / 1e9:.1f}" for n in numbers), f"{sizes.step.flops / 1e12:.1f}"]


def measured(precision: str, mode: str) -> list[str]:
    found = measure("lm-cpu", precision, mode, device="cpu", small=False)  # pyright: ignore[reportArgumentType]
    return [precision, mode, f"{found['gb']:.2f}", f"{found['ms'] / 1e3:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    columns = MEASURED if (measuring := parser.parse_args().measure) else COUNTED
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as fresh:  # a process for each row
        if measuring:
            modes = ("eager", "eager, twice", "compiled", "compiled, twice")
            rows = (fresh.submit(measured, "fp32", mode) for mode in modes)
        else:
            cases = [(c, p, t) for c in ("lm", "lm-64") for p in ("32-true", "bf16-mixed") for t in (False, True)]
            rows = (fresh.submit(counted, case, precision, twice=twice) for case, precision, twice in cases)
        for row in rows:
            print(f"| {' | '.join(row.result())} |", flush=True)


if __name__ == "__main__":
    main()
