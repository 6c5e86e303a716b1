"""How a step is compiled: by torch.compile, and on one GPU as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch._functorch import config as functorch

Compile = bool | Literal["graphs"]


KEPT = 0.5
"""Of the bytes that torch's partitioner would keep for a backward, where a step is to keep less. What goes first is
cheap to compute again: masks, and what they are multiplied with. Matrix products stay."""


def compiled(step: Callable[..., Any], compile: Compile, *, keep_less: bool = False) -> Callable[..., Any] | None:
    """The function compiled, or None where it is not to be.

    With "graphs" its kernels are started all at once, by CUDA graphs: each call gives its tensors in the memory of
    those of the call before, and the gradients of that one are gone. With `keep_less` the backward computes more again.
    """
    if compile not in (False, True, "graphs"):
        raise ValueError(f"compile: expected False, True or 'graphs', got {compile!r}.")
    if not compile:
        return None
    run = torch.compile(step) if compile is True else torch.compile(step, mode="reduce-overhead")
    if compile is True and not keep_less:
        return run

    def next_step(*arguments: Any) -> Any:
        if compile == "graphs":
            # Else the first backward inside the step, that of a warmup, would end it, and free what comes later.
            torch.compiler.cudagraph_mark_step_begin()
        with functorch.patch(activation_memory_budget=KEPT if keep_less else 1.0):
            return run(*arguments)

    return next_step


def check_graphs(device: torch.device, *, ranks: int, micro_batches: int) -> None:
    """ValueError where a step cannot be replayed as CUDA graphs."""
    if device.type != "cuda" or ranks > 1 or micro_batches > 1:
        raise ValueError(
            "compile='graphs' replays the step of one GPU, which keeps no gradient for the next step: it needs a CUDA"
            f" device, one rank and no accumulation; got {device.type!r}, {ranks} ranks and {micro_batches} batches in"
            " a step. compile=True works everywhere."
        )
