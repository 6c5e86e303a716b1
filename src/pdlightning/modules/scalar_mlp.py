"""C independent MLPs of one number, one hidden layer: `[batch, C, hidden]`, the costliest tensors of toy recipes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def scalar_mlp_hidden(
    x: Float[Tensor, "*leading C"],
    w_in: Float[Tensor, "C hidden"],
    b_in: Float[Tensor, "C hidden"],
    w_out: Float[Tensor, "C hidden"],
    b_out: Float[Tensor, " C"],
) -> Float[Tensor, "*leading C"]:
    """sum_h gelu(x_c * w_in_ch + b_in_ch) * w_out_ch + b_out_c."""
    if torch.compiler.is_compiling() and x.dtype == torch.float32:
        flat = _Recomputed.apply(x.flatten(0, -2), w_in, b_in, w_out)
        return flat.view(x.shape) + b_out  # type: ignore[union-attr]
    return (F.gelu(torch.addcmul(b_in, x.unsqueeze(-1), w_in)) * w_out).sum(-1) + b_out


class _Recomputed(torch.autograd.Function):
    """The same for a compiler that fuses: backward computes z again, nothing of size `[batch, C, hidden]` is stored.

    Left to itself, the compiler stores two such tensors, and computes two exponentials where one will do.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> Tensor:
        ctx.save_for_backward(x, w_in, b_in, w_out)
        z = x.unsqueeze(-1) * w_in + b_in
        cdf, _ = _normal(z)
        return (z * cdf * w_out).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, w_in, b_in, w_out = ctx.saved_tensors
        x, g = x.unsqueeze(-1), grads[0].unsqueeze(-1)
        z = x * w_in + b_in
        cdf, density = _normal(z)
        slope = (cdf + z * density) * g
        grad_x = (slope * (w_in * w_out)).sum(-1)
        return grad_x, (slope * x).sum(0) * w_out, slope.sum(0) * w_out, (z * cdf * g).sum(0)


def _normal(z: Tensor) -> tuple[Tensor, Tensor]:
    """The normal distribution's cumulative function and its density at z, from one exponential.

    Abramowitz and Stegun 7.1.26: within 7.5e-8 of the cumulative function, so for float32 only.
    """
    bell = torch.exp(-0.5 * z * z)
    t = 1 / (1 + 0.3275911 * 0.7071067811865476 * z.abs())
    series = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    tail = 0.5 * bell * t * series
    return torch.where(z > 0, 1 - tail, tail), 0.3989422804014327 * bell
