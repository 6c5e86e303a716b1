"""How a batch meets a target, and which tensor of its result is compared; both replaceable by arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def default_run_batch(target: nn.Module, batch: Any) -> Any:
    """target(x) for a tensor, target(batch[0]) for a tuple (inputs first, labels after), target(**batch) for a dict."""
    if isinstance(batch, Tensor):
        return target(batch)
    if isinstance(batch, Mapping):
        return target(**batch)
    if isinstance(batch, (tuple, list)) and batch:
        return target(batch[0])
    raise TypeError(
        f"Cannot run a batch of type {type(batch).__name__}: expected a tensor, a tuple that begins with the inputs, or"
        " a dict of keyword arguments. Pass run_batch=lambda target, batch: ... for anything else."
    )


def default_output(result: Any) -> Tensor:
    """The tensor itself, `.logits` where there is one, the first element of a tuple."""
    if isinstance(result, Tensor):
        return result
    if isinstance(logits := getattr(result, "logits", None), Tensor):
        return logits
    if isinstance(result, (tuple, list)) and result and isinstance(result[0], Tensor):
        return result[0]
    raise TypeError(
        f"Cannot tell which tensor of a {type(result).__name__} to compare: expected a tensor, an object with .logits,"
        " or a tuple that begins with a tensor. Pass output=lambda result: ... for anything else."
    )
