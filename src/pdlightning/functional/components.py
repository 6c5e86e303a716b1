"""Masks and the forward pass of one site (spec 1, C4)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def interpolate_mask(
    ci: Float[Tensor, "*leading C"], source: Float[Tensor, "*leading C"]
) -> Float[Tensor, "*leading C"]:
    """m = ci + (1 - ci) * r: what ci does not claim is filled by the source (spec 1)."""
    return ci + (1 - ci) * source


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
        kept = activation if mask is None else activation * mask
        out = kept @ U
    else:
        if x_weight is None:
            raise ValueError("A delta mask needs the target's own product x W^T; pass x_weight.")
        m_delta = delta_mask.unsqueeze(-1)
        out = (activation * ((1 if mask is None else mask) - m_delta)) @ U + m_delta * x_weight
    return out if bias is None else out + bias
