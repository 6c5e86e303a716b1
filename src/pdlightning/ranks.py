"""What the ranks of a distributed training owe each other, so that they compute what one rank would (spec D2, D3).

Without a process group there is one rank, and everything here is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

A_LONG_TIME = timedelta(days=7)
"""The first rank may be training a target; that a rank has died ends the wait."""

_alone = False


def n_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    return dist.get_rank() if n_ranks() > 1 else 0


def refuse_parts(module: nn.Module) -> None:
    """A parameter that is divided among ranks (FSDP2) can only be used where all of it is there."""
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise RuntimeError(
            "V and U are divided among the ranks (FSDP2). Put them together on every rank,"
            " `with pdlightning.sharding.whole(pd.model): ...`, or load the finished run in one process: load_run(...)."
        )


@contextmanager
def as_the_only_rank() -> Iterator[None]:
    """What is computed inside is this rank's own affair: nothing is exchanged."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * n_ranks()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over the ranks, for a value that is nonlinear in it and that every rank computes alike (spec L3).

    Its gradient by the x of one rank counts that value once for every rank: the ranks' gradients are averaged later.
    """
    return x if n_ranks() == 1 else _SumOverRanks.apply(x)  # type: ignore[return-value]


@torch.no_grad()
def means_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor averaged over the ranks, in one exchange."""
    if n_ranks() == 1:
        return list(tensors)
    flat = torch.cat([x.reshape(-1) for x in tensors])
    dist.all_reduce(flat)
    parts = (flat / n_ranks()).split([x.numel() for x in tensors])
    return [part.view_as(x) for part, x in zip(parts, tensors, strict=True)]


@torch.no_grad()
def gathered(x: Tensor, *, dim: int) -> Tensor:
    """The parts of all ranks one behind the other."""
    if n_ranks() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(n_ranks())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)


def own_part(x: Tensor, *, dim: int) -> Tensor:
    """This rank's of as many equal parts as there are ranks."""
    if x.shape[dim] % n_ranks():
        raise ValueError(f"{x.shape[dim]} samples cannot be split evenly over {n_ranks()} ranks.")
    return x.chunk(n_ranks(), dim)[rank()].clone() if n_ranks() > 1 else x


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on some rank; every rank asks at the same time."""
    if n_ranks() == 1:
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


@contextmanager
def first_rank_first() -> Iterator[None]:
    """The first rank does the work while the others wait; what it leaves behind is there when they do it."""
    if n_ranks() == 1:
        yield
        return
    patient = dist.new_group(backend="gloo", timeout=A_LONG_TIME)
    if rank() > 0:
        dist.barrier(patient)  # pyright: ignore[reportArgumentType]
    yield
    if rank() == 0:
        dist.barrier(patient)  # pyright: ignore[reportArgumentType]
