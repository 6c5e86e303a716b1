"""What `gpu.py` runs in its processes: the steps, their time and memory, and how far they are from float64."""

from __future__ import annotations

import resource
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from plain import RECIPES, Recipe, resid_mlp, sparse_features
from plain_lm import ADAM_BETAS, Shape
from step import our_language_model, our_toy, resident, stepping
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pdlightning.compiling import Compile
from pdlightning.decomposition import ParameterDecomposition
from pdlightning.masking import AdamAscent, AllSites, Binomial, PersistentPGD
from pdlightning.metrics import OutputMSE, ReconstructionLoss
from pdlightning.schedules import Anneal, Schedule

Precision = Literal["fp32", "tf32", "bf16"]
Mode = Literal["eager", "eager, twice", "compiled", "compiled, twice", "graphs"]
COMPARED_STEPS = 3
"""The first steps from the same start, whose losses are compared; an adversary has climbed nine times in them."""

HEADLINE = Shape(
    layers=4, d=768, heads=6, d_mlp=3072, vocab=50277, sequence=512, batch=8, ci_d=2048, ci_blocks=8, ci_heads=16
)
"""The published run (spec 9): 67 million parameters. C differs from site to site, with the published sum, 38,912."""
HEADLINE_SITES = {
    "h.*.attn.[qk]_proj": 512,
    "h.*.attn.v_proj": 1536,
    "h.*.attn.o_proj": 2048,
    "h.*.c_fc": 2560,
    "h.*.down_proj": 2560,
}
MIDDLING = Shape(
    layers=2, d=256, heads=4, d_mlp=1024, vocab=8192, sequence=256, batch=8, ci_d=512, ci_blocks=4, ci_heads=8
)
"""A CPU takes its steps in seconds, and what they keep is gigabytes."""
SMALL = Shape(
    layers=1, d=32, heads=4, d_mlp=64, vocab=128, sequence=16, batch=4, C=32, ci_d=32, ci_blocks=1, ci_heads=4
)


def resid_mlp3(*, batch_size: int, C: int, hidden: int) -> Recipe:
    sites = {f"blocks.{i}.{name}": C for i in range(3) for name in ("mlp_in", "mlp_out")}
    settings: dict[str, Any] = dict(ci_hidden=[hidden], importance_coeff=1e-5, p=2.0, lr=1e-3, schedule="constant")
    return Recipe(
        partial(resid_mlp, n_features=102, n_layers=3, neurons=17),
        partial(sparse_features, batch_size, 102, -1.0, 0.01),
        sites,
        settings | {"batch_size": batch_size},
    )


def build(case: str, *, compile: Compile, small: bool, twice: bool = False) -> tuple[ParameterDecomposition, Tensor]:
    """A decomposition at its start and its batch, on the CPU. The shapes of the spec (section 9), unless `small`.

    `twice`: the blocks of the ci function of a language model are computed again in the backward.
    """
    if case == "tms_5-2":
        recipe = RECIPES[case]
        fewer = recipe._replace(batch=partial(sparse_features, 64, 5, 0.0, 0.05))
        return our_toy(fewer if small else recipe, compile=compile)
    if case == "resid_mlp3":
        sizes = dict(batch_size=64, C=20, hidden=8) if small else dict(batch_size=2048, C=500, hidden=128)
        return our_toy(resid_mlp3(**sizes), compile=compile)
    shape = MIDDLING if case == "lm-cpu" else HEADLINE._replace(batch=64 if case == "lm-64" else 8)
    if small:
        shape = SMALL._replace(batch=shape.batch // 2)
    return our_language_model(
        compile=compile,
        shape=shape,
        sites={site: C // 64 if small else C for site, C in HEADLINE_SITES.items()},
        p=Anneal(start=2.0, end=0.4),
        lr=Schedule(start=5e-5, kind="cosine", final_frac=0.1),
        source_lr=Schedule(start=0.01, warmup_frac=0.025),
        twice=twice,
    )


def build_for_agreement(case: str, *, small: bool) -> tuple[ParameterDecomposition, Tensor]:
    """Steps that the CPU takes in seconds, with a term for every kind of source."""
    if case == "lm":
        return our_language_model(compile=False, shape=SMALL if small else None)
    adversary = PersistentPGD(
        optimizer=AdamAscent(lr=0.01, betas=ADAM_BETAS), scope="per_sample_per_position", n_warmup=2
    )
    more = {
        name: ReconstructionLoss(coeff=1.0, source=source, routing=AllSites(), comparison=OutputMSE())
        for name, source in {"binomial_recon": Binomial(), "persistent_pgd_recon": adversary}.items()
    }
    recipe = RECIPES["tms_5-2"]
    if case == "resid_mlp3":
        recipe = resid_mlp3(batch_size=64, C=20, hidden=8) if small else resid_mlp3(batch_size=64, C=500, hidden=128)
    return our_toy(recipe, compile=False, more_losses=more)


def place(
    decomposition: ParameterDecomposition, batch: Tensor, device: str, dtype: torch.dtype | None = None
) -> Tensor:
    """Move the decomposition, and cast it where a dtype is given; the batch with it, unless it is tokens."""
    decomposition.to(device=torch.device(device), dtype=dtype)
    return batch.to(device, dtype if batch.is_floating_point() else None)


def seen(case: str, *, device: str, dtype: torch.dtype, small: bool) -> dict[str, dict[str, Tensor]]:
    """Losses of the first steps, ci before and gradients after the first of them."""
    decomposition, batch = build_for_agreement(case, small=small)
    batch = place(decomposition, batch, device, dtype)
    ci = {site: x.double().cpu() for site, x in decomposition.causal_importances(batch).lower.items()}
    step, losses, gradients = stepping(decomposition, batch, "fp32"), {}, {}
    for i in range(COMPARED_STEPS):
        for name, (total, count) in step().items():
            losses[f"{name} of step {i}"] = (total.detach() / count).double().cpu()
        if i == 0:
            parameters = decomposition.named_parameters()
            gradients = {name: p.grad.double().cpu() for name, p in parameters if p.grad is not None}
    return {"losses": losses, "ci": ci, "gradients": gradients}


def difference(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The greatest over all tensors of |found - reference| / |reference| (norms); nan where one is not finite."""
    if found.keys() != reference.keys():
        raise ValueError(f"expected tensors of the same names, these are in one alone: {found.keys() ^ reference}")
    tiny = torch.finfo(torch.float64).tiny  # of a reference of zeros only zeros are 0 away
    ratios = [(x - reference[name]).norm() / reference[name].norm().clamp(min=tiny) for name, x in found.items()]
    return float(torch.stack(ratios).max())


def agreement(case: str, *, device: str, small: bool) -> list[dict[str, Any]]:
    """One row for each pair that is compared: every device in float32 with float64 on the CPU, and with each other."""
    torch.set_float32_matmul_precision("highest")
    runs = {"cpu fp64": seen(case, device="cpu", dtype=torch.float64, small=small)}
    for where in dict.fromkeys(("cpu", device)):
        runs[f"{where} fp32"] = seen(case, device=where, dtype=torch.float32, small=small)
    names = list(runs)
    pairs = [(name, other) for i, name in enumerate(names) for other in names[:i]]
    return [
        {
            "variant": f"{name} to {other}",
            "differences": {what: difference(runs[name][what], runs[other][what]) for what in runs[name]},
        }
        for name, other in pairs
    ]


def cast_target(decomposition: ParameterDecomposition) -> None:
    for parameter in decomposition.target.parameters():  # V and U, which require grad, are in there as well
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def measure(case: str, precision: Precision, mode: Mode, *, device: str, small: bool) -> dict[str, Any]:
    """Losses of the first steps; then ms, GB at most, host waits and (eager) FLOPs of a step."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    before = resident()
    compile: Compile = "graphs" if mode == "graphs" else mode.startswith("compiled")
    decomposition, batch = build(case, compile=compile, small=small, twice=mode.endswith("twice"))
    if precision == "bf16":
        cast_target(decomposition)
    batch = place(decomposition, batch, device)
    step = stepping(decomposition, batch, precision)
    losses = [values(step()) for _ in range(COMPARED_STEPS)]
    found: dict[str, Any] = {"losses": losses, "samples": len(batch)}
    if mode == "eager":
        found["flops"], found["flops_of_weights"] = counted(step), counted(partial(weights_alone, decomposition))
    if device == "cuda":
        found["host_waits"] = host_waits(step)
    found["ms"] = milliseconds(step, device, seconds=0.05 if small else 0.4, blocks=3 if small else 7)
    resident_at_most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 2**20 * (resident_at_most - before)
    return found | {"gb": peak / 1e9}


def values(pairs: dict[str, Any]) -> dict[str, float]:
    return {name: float(total.detach() / count) for name, (total, count) in pairs.items()}


def milliseconds(step, device: str, *, seconds: float, blocks: int) -> float:
    """Median over blocks of about so many seconds. The host waits for the device only before and after a block."""

    def block(n: int) -> float:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(n):
            step()
        synchronize(device)
        return (time.perf_counter() - begin) / n

    block(2)  # caches and allocator
    n = max(1, round(seconds / block(1)))
    return 1e3 * statistics.median(block(n) for _ in range(blocks))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class FlopCounter(TorchDispatchMode):
    """torch's formulas without its FlopCounterMode, whose hooks on modules forbid the autograd.grad of a warmup."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def counted(function) -> int:
    """FLOPs of the matrix products and attentions that a call makes, its backward included."""
    with FlopCounter() as counter:
        function()
    return counter.total


def weights_alone(decomposition: ParameterDecomposition) -> None:
    """The products of a step that do not grow with the batch: V U of every site, for the faithfulness loss."""
    sum(c.weight.square().sum() for c in decomposition.components.values()).backward()  # pyright: ignore


def host_waits(step) -> list[str]:
    """Where one step makes the host wait for the device, `file:line` for each time."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return [f"{Path(w.filename).name}:{w.lineno}" for w in waits]
