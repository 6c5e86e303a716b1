"""The formulas of the losses (spec 4 R3-R4, 5 L2-L3). Reductions are pairs (sum, count) until the very end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from pdlightning.functional.derivatives import large, refuse_second_derivative

Pair = tuple[Tensor, int]
"""(sum, count): adds over samples, sites and batches; the value is sum / count at the very end (spec R4)."""

Tensors = Mapping[str, Tensor] | Sequence[Tensor] | Tensor


def _each(tensors: Tensors) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    return list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)


def faithfulness_loss(weight_deltas: Tensors) -> Float[Tensor, ""]:
    """sum_s ||D_s||_F^2 / sum_s numel(W_s), the `mean_squared` form, in at least fp32 (spec L2)."""
    deltas = _each(weight_deltas)
    return torch.stack([_square_sum(d) for d in deltas]).sum() / sum(d.numel() for d in deltas)


def relative_faithfulness_loss(weight_deltas: Tensors, weights: Tensors) -> Float[Tensor, ""]:
    """mean_s ||D_s||_F^2 / ||W_s||_F^2, the `relative` form (spec L2). Mappings meet by site, others by order."""
    matched = _each(weights)
    if isinstance(weight_deltas, Mapping) and isinstance(weights, Mapping):
        matched = [weights[site] for site in cast(Mapping[str, Tensor], weight_deltas)]
    ratios = [_square_sum(d) / _square_sum(w) for d, w in zip(_each(weight_deltas), matched, strict=True)]
    return torch.stack(ratios).mean()


def _square_sum(x: Tensor) -> Tensor:
    return (x if x.dtype == torch.float64 else x.float()).square().sum()


def lp_penalty(u: Float[Tensor, "*shape"], p: Tensor | float, eps: float = 1e-12) -> Float[Tensor, "*shape"]:
    """phi(u) = (u + eps)^p (spec L3)."""
    return _Power.apply(u, p, eps) if large(u) else (u + eps) ** p  # type: ignore[return-value]


class _Power(torch.autograd.Function):
    """(u + eps)^p, which keeps u for the backward, and neither u + eps nor the result."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, p: Tensor | float, eps: float) -> Tensor:
        ctx.save_for_backward(u, p if isinstance(p, Tensor) else None)
        ctx.number, ctx.eps = None if isinstance(p, Tensor) else p, eps
        return (u + eps) ** p

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        refuse_second_derivative("A large penalty")
        (u, p), (g,) = ctx.saved_tensors, gradients
        above, p = u + ctx.eps, ctx.number if p is None else p
        of_p = (g * above**p * above.log()).sum() if ctx.needs_input_grad[1] else None
        return g * (p * above ** (p - 1)), of_p, None


def smooth_l0_penalty(
    u: Float[Tensor, "*shape"], gamma: Tensor | float, *, normalised: bool = False
) -> Float[Tensor, "*shape"]:
    """phi(u) = u^2 / (u^2 + gamma^2), times (1 + gamma^2) when `normalised`, so that phi(1) = 1 (spec L3)."""
    square = u.square()
    phi = square / (square + gamma**2)
    return phi * (1 + gamma**2) if normalised else phi


def frequency_weighted_sum(
    frequency: Float[Tensor, " C"], log_frequency: Float[Tensor, " C"], *, beta: float, count: float
) -> Float[Tensor, ""]:
    """sum_c [ f_c + beta * f_c * log2(1 + N f'_c) ] with N = `count` (spec L3).

    f' is f itself, or a smoother estimate of it; `count` is N, or a reference count in its place.
    """
    value = frequency.sum()
    return value + beta * (frequency * torch.log2(1 + count * log_frequency)).sum() if beta else value


def importance_minimality_loss(
    ci_upper: Tensors, p: Tensor | float, beta: float, eps: float = 1e-12
) -> Float[Tensor, ""]:
    """sum_s sum_c [ f_c + beta * f_c * log2(1 + N f_c) ], f_c = mean over the N positions of (upper + eps)^p (spec L3).

    `ci_upper`: one tensor `[*leading, C]`, or one for each site.
    """
    values = []
    for upper in _each(ci_upper):
        count = upper.numel() // upper.shape[-1]
        frequency = lp_penalty(upper, p, eps).flatten(0, -2).sum(0) / count
        values.append(frequency_weighted_sum(frequency, frequency, beta=beta, count=count))
    return torch.stack(values).sum()


def squared_error(clean: Float[Tensor, "*shape"], masked: Float[Tensor, "*shape"]) -> Pair:
    """(sum of squared differences in at least fp32, number of elements) (spec R3 `mse`)."""
    dtype = torch.promote_types(masked.dtype, torch.float32)
    return (masked.to(dtype) - clean).square().sum(), clean.numel()
