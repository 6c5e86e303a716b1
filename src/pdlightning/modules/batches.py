"""How a batch meets a target, and which tensor of its result is compared; both replaceable by arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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


def token_ids(batch: Any) -> Tensor | None:
    """The integers of a batch, itself, the first of a tuple or `input_ids` of a dict; None where there are none."""
    found = batch
    if isinstance(batch, Mapping):
        found = batch.get("input_ids")
    elif isinstance(batch, (tuple, list)) and batch:
        found = batch[0]
    is_tokens = isinstance(found, Tensor) and found.dtype in (torch.uint8, torch.int16, torch.int32, torch.int64)
    return found if is_tokens else None


def empty_last(batch: Any) -> tuple[Tensor, int] | None:
    """(order, distinct): an order of the samples in which only the first `distinct` can differ.

    Most samples of sparse toy data are all zero, and one ci function call serves them all. Only for `[batch, features]`
    on the CPU: elsewhere the host would have to wait for the count. None where no two samples are all zero.
    """
    if not (isinstance(batch, Tensor) and batch.ndim == 2 and batch.is_floating_point() and batch.device.type == "cpu"):
        return None
    filled = batch.any(dim=1)
    distinct = int(filled.sum()) + 1
    if distinct >= len(batch):
        return None
    return torch.cat([filled.nonzero(), filled.logical_not().nonzero()]).squeeze(1), distinct
