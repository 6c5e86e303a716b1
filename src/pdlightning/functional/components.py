"""Masks and the forward pass of one site (spec 1, C4)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pdlightning.functional.derivatives import large, refuse_second_derivative


def interpolate_mask(
    ci: Float[Tensor, "*leading C"], source: Float[Tensor, "*leading C"]
) -> Float[Tensor, "*leading C"]:
    """m = ci + (1 - ci) * r, in the dtype of ci: what ci does not claim is filled by the source (spec 1)."""
    if large(ci):
        return _Interpolation.apply(ci, source)  # type: ignore[return-value]
    return ci + (1 - ci) * source.to(ci.dtype)


class _Interpolation(torch.autograd.Function):
    """`interpolate_mask`, which keeps ci and source for the backward, and neither 1 - ci nor a cast source."""

    @staticmethod
    def forward(ctx: Any, ci: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(ci, source)
        return ci + (1 - ci) * source.to(ci.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        refuse_second_derivative("A large mask")
        (ci, source), (g,) = ctx.saved_tensors, gradients
        of_ci, of_source = ctx.needs_input_grad
        return (
            _gradient_of(ci, g * (1 - source.to(ci.dtype))) if of_ci else None,
            _gradient_of(source, g * (1 - ci)) if of_source else None,
        )


def _gradient_of(x: Tensor, gradient: Tensor) -> Tensor:
    """Summed over the axes that x was broadcast along, in the dtype of x."""
    return gradient.sum_to_size(x.shape).to(x.dtype)


def component_forward(
    x: Float[Tensor, "*leading d_in"],
    V: Float[Tensor, "d_in C"],
    U: Float[Tensor, "C d_out"],
    mask: Float[Tensor, "*leading C"] | None,
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
    delta_mask: Float[Tensor, " *leading"] | None = None,
) -> Float[Tensor, "*leading d_out"]:
    """y = ((x V) * m) U + m_D * (x D^T) + b with D = W - (V U)^T, in the form that never builds D (spec C4).

    `mask` None keeps every subcomponent whole; `delta_mask` None leaves the delta out, and then `weight` is not read.
    """
    if delta_mask is None:
        return masked_product(x @ V, U, mask=mask, delta_mask=None, x_weight=None, bias=bias)
    return masked_product(x @ V, U, mask=mask, delta_mask=delta_mask, x_weight=F.linear(x, weight), bias=bias)


def masked_product(
    activation: Float[Tensor, "*leading C"],
    U: Float[Tensor, "C d_out"],
    *,
    mask: Float[Tensor, "*leading C"] | None,
    delta_mask: Float[Tensor, " *leading"] | None,
    x_weight: Float[Tensor, "*leading d_out"] | None,
    bias: Float[Tensor, " d_out"] | None,
) -> Float[Tensor, "*leading d_out"]:
    """((m - m_D) * (x V)) U + m_D * (x W^T) + b from the products x V and x W^T (spec C4)."""
    if delta_mask is None:
        out = activation @ U if mask is None else _times(activation, mask, U)
    else:
        if x_weight is None:
            raise ValueError("A delta mask needs the target's own product x W^T; pass x_weight.")
        m_delta = delta_mask.unsqueeze(-1)
        out = _times(activation, (1 if mask is None else mask) - m_delta, U) + m_delta * x_weight
    return out if bias is None else out + bias


def _times(a: Float[Tensor, "*leading C"], m: Tensor, U: Float[Tensor, "C d_out"]) -> Float[Tensor, "*leading d_out"]:
    return _MaskedProduct.apply(a, m, U) if large(a) else (a * m) @ U  # type: ignore[return-value]


class _MaskedProduct(torch.autograd.Function):
    """(a * m) U, whose backward computes a * m again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, m: Tensor, U: Tensor) -> Tensor:
        ctx.save_for_backward(a, m, U)
        return (a * m) @ U

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("A large masked product")
        (a, m, U), (g,) = ctx.saved_tensors, gradients
        of_a, of_m, of_U = ctx.needs_input_grad
        of_kept = g @ U.T.to(g.dtype)  # g has the dtype that autocast gave the product, U its own
        return (
            _gradient_of(a, of_kept * m) if of_a else None,
            _gradient_of(m, of_kept * a) if of_m else None,
            _gradient_of(U, _rows(a * m).T.to(g.dtype) @ _rows(g)) if of_U else None,
        )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
