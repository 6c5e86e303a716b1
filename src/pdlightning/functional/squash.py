"""Squashings: from ci logits to causal importances (spec I1)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

ALPHA = 0.01


def where_above(g: Tensor, x: Tensor, threshold: float) -> Tensor:
    """g where x > threshold, else 0, in one pass: on a CPU `torch.where` and its comparison cost ten times as much."""
    return torch.ops.aten.threshold_backward(g, x, threshold)


class _LowerLeakyHard(torch.autograd.Function):
    """clamp(x, 0, 1) whose backward leaks a push upward through x <= 0, so that a dead subcomponent can return."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return x.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,), (g,) = ctx.saved_tensors, grads
        positive = where_above(g, x, 0.0)
        leak = (g - positive).clamp_(max=0.0).mul_(ctx.alpha)
        return leak.add_(positive).sub_(where_above(g, x, 1.0)), None


class _UpperLeakyHard(torch.autograd.Function):
    """clamp(x, 0, 1) + alpha * relu(x - 1) with its ordinary gradient, which is 1 at both ends of [0, 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return x.clamp(0.0, 1.0).add_(torch.relu(x - 1.0), alpha=alpha)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,), (g,) = ctx.saved_tensors, grads
        just_below_zero = -torch.finfo(x.dtype).tiny
        return where_above(g, x, just_below_zero).add_(where_above(g, x, 1.0), alpha=ctx.alpha - 1.0), None


def lower_leaky_hard_sigmoid(x: Float[Tensor, "*shape"], alpha: float = ALPHA) -> Float[Tensor, "*shape"]:
    """clamp(x, 0, 1); backward: 0 < x <= 1 passes g, x <= 0 passes alpha * min(g, 0), x > 1 passes 0 (spec I1).

    Feeds the masks.
    """
    return _LowerLeakyHard.apply(x, alpha)  # type: ignore[return-value]


def upper_leaky_hard_sigmoid(x: Float[Tensor, "*shape"], alpha: float = ALPHA) -> Float[Tensor, "*shape"]:
    """1 + alpha * (x - 1) for x > 1, else clamp(x, 0, 1), with the ordinary gradient (spec I1).

    Feeds the importance penalty only: a logit above one still feels the penalty.
    """
    return _UpperLeakyHard.apply(x, alpha)  # type: ignore[return-value]


def leaky_hard_sigmoid(x: Float[Tensor, "*shape"], alpha: float = ALPHA) -> Float[Tensor, "*shape"]:
    """The identity on [0, 1] with slope alpha on both sides: values leave [0, 1] by the leak (spec I1)."""
    return x.clamp(0.0, 1.0) + alpha * (x - x.clamp(0.0, 1.0))


def hard_sigmoid(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """clamp(x, 0, 1), ordinary gradient (spec I1)."""
    return x.clamp(0.0, 1.0)


def swish_hard_sigmoid(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """min(x * sigmoid(x), 1) from below 0 cut off: clamp(swish(x), 0, 1), a smooth start at the foot (spec I1)."""
    return torch.nn.functional.silu(x).clamp(0.0, 1.0)
