"""How large a run is: its sites and parameters, the memory that it needs, and whether the device has that much."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor, nn

from pdlightning.config import ConfigError
from pdlightning.decomposition import ParameterDecomposition
from pdlightning.modules.surgery import find_sites
from pdlightning.rehearsal.dry import TRUE_DTYPES, DryDecomposition, NotCountable, StepCost
from pdlightning.results import aligned, number

ROWS = 24
"""At most so many rows of sites."""
COPIES = 4
"""A parameter, its gradient, and the two moments of AdamW."""
STEP_NUMBER = 4
"""Bytes of the count of updates that AdamW keeps with each parameter."""
FLOP = ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"]
REMEDY = (
    "What makes it smaller: a smaller C (pd.sites), a smaller ci function (ci_fn), precision=bf16 or"
    " runtime.target_dtype=bfloat16 for the frozen target, a smaller data.batch_size or more devices that share it"
    " (runtime.devices), or persistent sources that positions share (loss.*.source.scope)."
)


@dataclass(frozen=True)
class SiteSize:
    """One site: V is (d_in, C), U is (C, d_out)."""

    path: str
    kind: str
    d_in: int
    d_out: int
    C: int

    @property
    def parameters(self) -> int:
        return (self.d_in + self.d_out) * self.C


@dataclass(frozen=True)
class Sizes:
    """Of one rank. Numbers of parameters, and bytes.

    Args:
        sites: in the order of the target.
        ci_fn, target: numbers of parameters.
        target_bytes: the frozen target with its buffers.
        parameter_bytes: V, U and the ci function; their gradients are as large.
        optimizer_bytes: the two moments of AdamW, and its counts.
        shards: ranks that share parameters, gradients and optimizer (FSDP), each with one part.
        step: what a training step costs; None where it could not be told.
        reason: why not.
    """

    sites: list[SiteSize]
    ci_fn: int
    target: int
    target_bytes: int
    parameter_bytes: int
    optimizer_bytes: int
    step: StepCost | None
    reason: str = ""
    shards: int = 1

    @property
    def certain(self) -> dict[str, int]:
        """Bytes that a run cannot do without, by what they are of."""
        sources = {} if self.step is None else {"persistent sources": self.step.sources}
        gathered = {} if self.shards == 1 else {"parameters gathered for a step": self.parameter_bytes}
        return {
            "frozen target": self.target_bytes,
            "trained parameters": self.parameter_bytes // self.shards,
            "gradients": self.parameter_bytes // self.shards,
            "optimizer": self.optimizer_bytes // self.shards,
            **gathered,
            **sources,
        }

    @property
    def together(self) -> int:
        """All bytes that are known."""
        return sum(self.certain.values()) + (0 if self.step is None else self.step.activations)

    def check(self, runtime: Mapping[str, Any]) -> None:
        """Raise a `ConfigError` where what is certain is more than the device has; warn where all together is."""
        check_memory(self.certain, runtime)
        device, there, sharing = memory_of(runtime)
        if self.together * sharing > there:
            rank_zero_warn(
                f"This run may not fit: with activations a training step needs up to {bytes_said(self.together)}, and"
                f" {device} has {bytes_said(there)}{shared_by(sharing)}. {REMEDY} Activations alone:"
                " runtime.checkpoint_activations=true, where the ci function is a transformer."
            )

    def table(self) -> str:
        """A row for each kind of site, the totals, and the memory of a training step."""
        head = ["site", "kind", "d_in x d_out", "C", "parameters"]
        groups = [[name, s.kind, f"{s.d_in} x {s.d_out}", str(s.C), count(n)] for name, s, n in grouped(self.sites)]
        if len(groups) > ROWS:
            groups = [*groups[: ROWS - 1], [f"... and {len(groups) - ROWS + 1} more", "", "", "", ""]]
        components = sum(site.parameters for site in self.sites)
        totals = f"components {count(components)} in {len(self.sites)} sites, ci function {count(self.ci_fn)}, "
        memory = {what: bytes_said(n) for what, n in self.certain.items() if n}
        if self.step is None:
            memory["activations"] = f"not known ({self.reason})"
        else:
            memory["activations"] = f"{bytes_said(self.step.activations)} at most, without torch.compile"
        memory["together"] = bytes_said(self.together)
        work = [] if self.step is None else [f"It computes {in_steps(self.step.flops, FLOP)} in matrix products."]
        return "\n".join(
            [
                *aligned([head, *groups]),
                f"  {totals}frozen target {count(self.target)} parameters",
                "Memory of a training step, on each device:",
                *aligned([[what, said] for what, said in memory.items()]),
                *work,
            ]
        )


def sizes_of(
    decomposition: ParameterDecomposition,
    batch: Any,
    *,
    precision: str,
    samples: int | None = None,
    shards: int = 1,
    gradients_kept: bool = False,
) -> Sizes:
    """The sizes of a training on batches like this one; with `samples`, if a rank had so many of it.

    `gradients_kept`: from one step to the next, and through its forward.
    """
    step, reason = None, ""
    try:
        dry = DryDecomposition(decomposition, precision=precision)
        step = dry.cost(batch, samples=samples, gradients_kept=gradients_kept)
    except NotCountable as error:
        reason = str(error)
    trained = [*decomposition.components.parameters(), *decomposition.model.ci_fn.parameters()]
    dtype = TRUE_DTYPES.get(precision)
    parameter_bytes = bytes_of(trained, dtype)
    frozen = list(distinct(decomposition.target.parameters(), but=trained))
    return Sizes(
        sites=[SiteSize(c.path, c.kind, c.d_in, c.d_out, c.C) for c in decomposition.components.values()],
        ci_fn=sum(p.numel() for p in decomposition.model.ci_fn.parameters()),
        target=sum(p.numel() for p in frozen),
        target_bytes=bytes_of([*frozen, *decomposition.target.buffers()], dtype),
        parameter_bytes=parameter_bytes,
        optimizer_bytes=2 * parameter_bytes + STEP_NUMBER * len(trained),
        step=step,
        reason=reason,
        shards=shards,
    )


def check_components(target: nn.Module, sites: Mapping[str, int], runtime: Mapping[str, Any]) -> None:
    """Refuse a C whose V and U alone are too large, before they are made; patterns are refused where they are made."""
    try:
        specs = find_sites(target, sites)
    except (ValueError, TypeError):
        return
    numbers = 0
    for spec in specs:
        weight = getattr(target.get_submodule(spec.module_path), "weight", None)
        numbers += spec.C * (sum(weight.shape) if spec.kind != "identity" and weight is not None else 2 * spec.width)
    shards = shards_of(runtime)
    copies = COPIES if shards == 1 else COPIES / shards + 1
    needed = int(copies * torch.float32.itemsize * numbers)
    check_memory({"V, U, their gradients and optimizer": needed}, runtime)


def shards_of(runtime: Mapping[str, Any]) -> int:
    """How many ranks share what is trained."""
    return runtime["devices"] * runtime["nodes"] if runtime["strategy"] == "fsdp" else 1


def check_memory(certain: Mapping[str, int], runtime: Mapping[str, Any]) -> None:
    device, there, sharing = memory_of(runtime)
    needed = sum(certain.values())
    if needed * sharing <= there:
        return
    parts = ", ".join(f"{what} {bytes_said(n)}" for what, n in certain.items() if n)
    raise ConfigError(
        f"This run cannot fit: it needs at least {bytes_said(needed)} ({parts}), activations not counted, and {device}"
        f" has {bytes_said(there)}{shared_by(sharing)}. {REMEDY}"
    )


def shared_by(ranks: int) -> str:
    return f" for {ranks} ranks that need as much each" if ranks > 1 else ""


def memory_of(runtime: Mapping[str, Any]) -> tuple[str, int, int]:
    """The device of this rank, its memory in bytes, and how many ranks share it."""
    if runtime["accelerator"] in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1], 1
    return "this machine", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), runtime["devices"]


def distinct(tensors: Iterable[Tensor], *, but: Iterable[Tensor]) -> Iterable[Tensor]:
    """Each once: V and U stand in the target too."""
    left_out = {id(x) for x in but}
    return (x for x in tensors if id(x) not in left_out)


def bytes_of(tensors: Iterable[Tensor], dtype: torch.dtype | None) -> int:
    """Bytes of tensors, of their floats in `dtype` where one is given."""
    return sum(
        x.numel() * (x.element_size() if dtype is None or not x.is_floating_point() else dtype.itemsize)
        for x in tensors
    )


def grouped(sites: Iterable[SiteSize]) -> list[tuple[str, SiteSize, int]]:
    """(name, one of them, parameters of all) of sites that differ in the numbers of their paths alone."""
    groups: dict[tuple[Any, ...], list[SiteSize]] = {}
    for s in sites:
        groups.setdefault((re.sub(r"\b\d+\b", "*", s.path), s.kind, s.d_in, s.d_out, s.C), []).append(s)
    return [
        (same[0].path if len(same) == 1 else f"{key[0]} x {len(same)}", same[0], sum(s.parameters for s in same))
        for key, same in groups.items()
    ]


def count(n: int) -> str:
    """A number of parameters: 1,234 or 12.3 M."""
    return f"{n:,}" if n < 10**6 else in_steps(n, ["", "k", "M", "B", "T"])


def bytes_said(n: int) -> str:
    """Bytes in powers of 1000: 1.5 GB."""
    return in_steps(n, ["B", "kB", "MB", "GB", "TB", "PB"])


def in_steps(n: float, units: list[str]) -> str:
    for unit in units[:-1]:
        if n < 999.5:
            return f"{number(float(f'{n:.3g}'))} {unit}".rstrip()
        n /= 1000
    return f"{number(float(f'{n:.3g}'))} {units[-1]}"
