"""Attention scores from queries and keys, and the KL between the patterns of two runs (spec R3 `attention`)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pdlightning.functional.derivatives import refuse_second_derivative
from pdlightning.functional.kl import (
    kl_gradient_of_rows,
    kl_of_rows,
    row_chunks,
    sum_of_chunks,
    summing_dtype,
)
from pdlightning.functional.losses import Pair


def split_heads(
    x: Float[Tensor, "*leading sequence width"], n_heads: int
) -> Float[Tensor, "*leading n_heads sequence d_head"]:
    """Consecutive columns are heads: `width = n_heads * d_head`."""
    return x.unflatten(-1, (n_heads, -1)).transpose(-3, -2)


def rotate(
    x: Float[Tensor, "*leading sequence d_head"], *, base: float, angles: torch.dtype = torch.float32
) -> Float[Tensor, "*leading sequence d_head"]:
    """RoPE (Su et al. 2021): at position t the pair (x_i, x_{i + d_head/2}) turned by the angle t * base^(-2i/d_head).

    The angles have the type `angles`, by default float32 whatever x is, as in the models. They are made anew: as a
    buffer they would be rounded with the module, and bfloat16 cannot tell position 256 from 257.
    """
    frequencies = 1.0 / base ** (torch.arange(0, x.shape[-1], 2, device=x.device).to(angles) / x.shape[-1])
    angle = torch.arange(x.shape[-2], device=x.device).to(angles).unsqueeze(-1) * frequencies
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention_scores(
    q: Float[Tensor, "*leading query d_head"], k: Float[Tensor, "*leading key d_head"], *, scale: float, causal: bool
) -> Float[Tensor, "*leading query key"]:
    """q k^T * scale; with `causal` a later key has the lowest number there is, so that its probability is exactly 0."""
    scores = q @ k.mT * scale
    if not causal:
        return scores
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, torch.finfo(scores.dtype).min)  # -inf would make 0 * (inf - inf) of a KL


def pattern_kl_of_heads(
    clean_q: Float[Tensor, "heads query d_head"],
    clean_k: Float[Tensor, "heads key d_head"],
    q: Float[Tensor, "heads query d_head"],
    k: Float[Tensor, "heads key d_head"],
    scale: float,
    causal: bool,
) -> Float[Tensor, ""]:
    """sum over heads and queries of the KL over keys."""
    with torch.autocast(q.device.type, enabled=False):
        clean = attention_scores(clean_q, clean_k, scale=scale, causal=causal)
        return kl_of_rows(clean, attention_scores(q, k, scale=scale, causal=causal))


class ChunkedPatternKL(torch.autograd.Function):
    """`pattern_kl_of_heads` some heads at a time; the backward makes their scores again, so that none are kept."""

    @staticmethod
    def forward(
        ctx: Any, clean_q: Tensor, clean_k: Tensor, q: Tensor, k: Tensor, scale: float, causal: bool
    ) -> Float[Tensor, ""]:
        ctx.save_for_backward(clean_q, clean_k, q, k)
        ctx.scale, ctx.causal = scale, causal

        def value(i: slice) -> Tensor:
            return pattern_kl_of_heads(clean_q[i], clean_k[i], q[i], k[i], scale, causal)

        return sum_of_chunks(value, q, q.shape[1] * k.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("The KL of attention patterns")
        clean_q, clean_k, q, k = ctx.saved_tensors
        q_gradient, k_gradient = torch.empty_like(q), torch.empty_like(k)
        with torch.autocast(q.device.type, enabled=False):
            for i in row_chunks(q, q.shape[1] * k.shape[1]):
                clean = attention_scores(clean_q[i], clean_k[i], scale=ctx.scale, causal=ctx.causal)
                masked = attention_scores(q[i], k[i], scale=ctx.scale, causal=ctx.causal)
                gradient = kl_gradient_of_rows(clean, masked).mul_(gradients[0] * ctx.scale)
                q_gradient[i], k_gradient[i] = gradient @ k[i], gradient.mT @ q[i]
        return None, None, q_gradient, k_gradient, None, None


def pattern_kl_pair(
    clean: tuple[Float[Tensor, "*leading head query d_head"], Float[Tensor, "*leading kv_head key d_head"]],
    masked: tuple[Float[Tensor, "*leading head query d_head"], Float[Tensor, "*leading kv_head key d_head"]],
    *,
    scale: float,
    causal: bool,
) -> Pair:
    """(sum over batch, head and query of KL(clean pattern || masked pattern), their number) (spec R3 `attention`).

    Both are (queries, keys) by head; a head of keys serves as many consecutive heads of queries as there are for each
    (GQA). Computed in at least fp32, never under autocast. The clean pattern is a constant: it gets no gradient.
    """
    heads = [x.flatten(0, -3) for x in (*by_query(*clean), *by_query(*masked))]
    compute = pattern_kl_of_heads if torch.compiler.is_compiling() else ChunkedPatternKL.apply
    total = compute(heads[0].detach(), heads[1].detach(), heads[2], heads[3], scale, causal)
    return total, heads[2].shape[0] * heads[2].shape[1]


def by_query(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Both in at least fp32, with a head of keys for every head of queries."""
    dtype = summing_dtype(q)
    return q.to(dtype), k.to(dtype).repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
