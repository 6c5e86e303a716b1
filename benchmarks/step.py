"""Steps per second of the training step against `plain.py`, on one machine in one run.

    python benchmarks/step.py                      # tms_5-2 and resid_mlp1, 1 and 2 threads, eager and compiled
    python benchmarks/step.py --cases tms_5-2 --threads 1 --no-compile
    python benchmarks/step.py --cases lm --steps 1 --precision bf16

Every variant runs in a process of its own with the same allocator environment; the variants take turns, so that a
noisy neighbour hits all of them; medians over the rounds. CPU time stands beside wall time. The peak is of resident
memory, beyond what the process held before the model was built; a compiler works in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from typing import Any

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


def make_plain(case: str, precision: str):
    import torch

    if case == "lm":
        from plain_lm import PlainLanguageStep, Shape, target_of, tokens_of

        plain, tokens = PlainLanguageStep(target_of(Shape()), Shape()), tokens_of(Shape())
        return lambda: autocast(precision, plain.step, tokens)
    from plain import RECIPES, PlainStep

    recipe = RECIPES[case]
    generator = torch.Generator().manual_seed(0)
    step = PlainStep(recipe.target(generator), recipe.sites, steps=10**6, **recipe.settings)
    batch = recipe.batch(generator)
    return lambda: autocast(precision, step.step, batch)


def autocast(precision: str, function, *arguments):
    """As Lightning's bf16-mixed does it: the whole step under autocast, where its first argument, the batch, is."""
    import torch

    with torch.autocast(arguments[0].device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return function(*arguments)


def our_toy(recipe, *, compile: Any, more_losses=None):
    """A recipe of `plain.py`, and losses beside its own, through ParameterDecomposition."""
    import torch

    from pdlightning.decomposition import ParameterDecomposition
    from pdlightning.masking import AllSites, EachSite, Uniform
    from pdlightning.metrics import FaithfulnessLoss, ImportanceMinimalityLoss, OutputMSE, ReconstructionLoss
    from pdlightning.modules import ScalarMLP
    from pdlightning.optimization import AdamW
    from pdlightning.schedules import Schedule

    settings = recipe.settings
    generator = torch.Generator().manual_seed(0)
    target = recipe.target(generator).requires_grad_(False)
    batch = recipe.batch(generator)
    kind, final = ("cosine", 0.0) if settings.get("schedule", "cosine") == "cosine" else ("constant", 1.0)
    optimizer = AdamW(lr=Schedule(start=settings["lr"], kind=kind, final_frac=final))

    def recon(routing):
        return ReconstructionLoss(coeff=1.0, source=Uniform(), routing=routing, comparison=OutputMSE())

    decomposition = ParameterDecomposition(
        target=target,
        sites=recipe.sites,
        ci_fn=ScalarMLP(hidden=settings["ci_hidden"]),
        losses={
            "faithfulness": FaithfulnessLoss(coeff=1.0),
            "importance_minimality": ImportanceMinimalityLoss(coeff=settings["importance_coeff"], p=settings["p"]),
            "stochastic_recon": recon(AllSites()),
            "stochastic_recon_layerwise": recon(EachSite()),
            **(more_losses or {}),
        },
        components_optimizer=optimizer,
        ci_optimizer=optimizer,
        compile=compile,
    )
    return decomposition, batch


def our_language_model(
    *, compile: Any, shape=None, sites=None, p: Any = 1.0, lr: Any = 5e-5, source_lr: Any = 0.01, twice: bool = False
):
    """The recipe of `plain_lm.py` through ParameterDecomposition; by default every site has the C of the shape.

    `twice`: what is large is computed again in the backward.
    """
    from plain_lm import ADAM_BETAS, Shape, target_of, tokens_of

    from pdlightning.decomposition import ParameterDecomposition
    from pdlightning.masking import AdamAscent, AllSites, PersistentPGD, Uniform, UniformSubset
    from pdlightning.metrics import FaithfulnessLoss, ImportanceMinimalityLoss, OutputKL, ReconstructionLoss
    from pdlightning.modules import GlobalTransformer
    from pdlightning.optimization import AdamW

    shape = shape or Shape()
    adversary = PersistentPGD(
        optimizer=AdamAscent(lr=source_lr, betas=ADAM_BETAS), scope="per_sample_per_position", n_warmup=2
    )

    def recon(source, routing):
        return ReconstructionLoss(coeff=0.5, source=source, routing=routing, comparison=OutputKL())

    decomposition = ParameterDecomposition(
        target=target_of(shape),
        sites=sites or {"h.*.attn.*_proj": shape.C, "h.*.c_fc": shape.C, "h.*.down_proj": shape.C},
        ci_fn=GlobalTransformer(
            d_model=shape.ci_d,
            n_blocks=shape.ci_blocks,
            n_heads=shape.ci_heads,
            mlp_hidden=[4 * shape.ci_d],
            checkpoint_activations=twice,
        ),  # fmt: skip
        losses={
            "faithfulness": FaithfulnessLoss(coeff=1e7),
            "importance_minimality": ImportanceMinimalityLoss(coeff=2e-4, p=p, beta=0.5),
            "stochastic_recon_subset": recon(Uniform(), UniformSubset()),
            "persistent_pgd_recon": recon(adversary, AllSites()),
        },
        components_optimizer=AdamW(lr=lr, clip=0.01),
        ci_optimizer=AdamW(lr=lr),
        compile=compile,
    )
    return decomposition, tokens_of(shape)


def make_ours(case: str, precision: str, *, compile: bool):
    """The same step, losses and recipe, through ParameterDecomposition and its optimiser, without a Trainer."""
    from plain import RECIPES

    made = our_language_model(compile=compile) if case == "lm" else our_toy(RECIPES[case], compile=compile)
    return stepping(*made, precision)


def stepping(pd, batch, precision: str):
    """A function that takes one whole step on `batch`, without a Trainer, and returns (sum, count) of every term."""
    pd.steps = 10**6
    torch_optimizer = pd.configure_optimizers()
    taken = 0

    def step():
        nonlocal taken
        pd.set_progress(taken)
        pd.set_learning_rates(torch_optimizer, taken)
        torch_optimizer.zero_grad()
        total, pairs, _ = autocast(precision, pd.compute_step, batch, pd.step_now)
        for name, loss in pd.terms.items():
            loss.update(pairs[name])
        total.backward()
        pd.on_before_optimizer_step(torch_optimizer)
        pd.configure_gradient_clipping(torch_optimizer)
        torch_optimizer.step()
        taken += 1
        return pairs

    return step


def serve(variant: str, case: str, threads: int, steps: int, precision: str) -> None:
    """Child process: warm up, then time `steps` steps for every line on standard input."""
    import torch

    torch.set_num_threads(threads)
    if variant != "plain":
        import pdlightning.decomposition  # noqa: F401 -- its imports are not what is measured
    before = resident()
    compiled = variant == "compiled"
    step = make_plain(case, precision) if variant == "plain" else make_ours(case, precision, compile=compiled)
    for _ in range(5):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        took = (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        print(json.dumps([1e3 * took[0], 1e3 * took[1], peak]), flush=True)


def resident() -> float:
    """MB of memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def measure(
    case: str, threads: int, variants: list[str], rounds: int, steps: int, precision: str
) -> dict[str, tuple[float, ...]]:
    """Median (wall ms, CPU ms, peak MB) per step of each variant; the variants take turns within every round."""
    children = {}
    environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    for variant in variants:
        command = [sys.executable, __file__, "--serve", variant, case, str(threads), str(steps), precision]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            sys.exit(f"{variant} of {case} did not start: see its traceback above")
        children[variant] = child
    taken: dict[str, list[list[float]]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, child in children.items():
            child.stdin.write("go\n")
            child.stdin.flush()
            taken[variant].append(json.loads(child.stdout.readline()))
    for child in children.values():
        child.stdin.close()
        child.wait()
    return {v: tuple(statistics.median(column) for column in zip(*t, strict=True)) for v, t in taken.items()}


def main() -> None:
    if "--serve" in sys.argv:
        at = sys.argv.index("--serve")
        variant, case, threads, steps, precision = sys.argv[at + 1 : at + 6]
        serve(variant, case, int(threads), int(steps), precision)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["tms_5-2", "resid_mlp1"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="steps in one turn")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    variants = ["plain", "eager", *([] if arguments.no_compile else ["compiled"])]
    print(
        f"{date.today()}  {platform.processor() or platform.machine()}, {os.cpu_count()} cores,"
        f" {arguments.precision}, load {os.getloadavg()[0]:.1f}"
    )
    heads = f"{'case':<12} {'threads':>7} {'variant':<9} {'wall ms':>9} {'CPU ms':>9} {'x wall':>7} {'x CPU':>7}"
    print(f"{heads} {'peak MB':>8}")
    for case in arguments.cases:
        for threads in arguments.threads:
            result = measure(case, threads, variants, arguments.rounds, arguments.steps, arguments.precision)
            plain_wall, plain_cpu, _ = result["plain"]
            for variant, (wall, cpu, peak) in result.items():
                row = f"{case:<12} {threads:>7} {variant:<9} {wall:>9.2f} {cpu:>9.2f}"
                print(f"{row} {plain_wall / wall:>7.2f} {plain_cpu / cpu:>7.2f} {peak:>8.0f}", flush=True)


if __name__ == "__main__":
    main()
