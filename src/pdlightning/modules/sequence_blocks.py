"""What ci functions for sequences are made of: RMS norm, self-attention with RoPE, pre-norm blocks (spec I2).

A layer with a GELU after it starts with the gain of relu, every other layer with that of a linear map; biases at 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pdlightning.functional.attention import rotate
from pdlightning.modules.mlp_ci import MLP

NORM_EPS = 1e-6

Direction = Literal["bidirectional", "causal"]


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """Self-attention over the sequence axis.

    Args:
        n_heads: heads; d_model / n_heads must be even, since RoPE turns pairs.
        direction: every position reads all positions, or only those up to its own.
        rope_base: at position t, RoPE turns pair i of a head by the angle t * rope_base^(-2i / d_head).
    """

    n_heads: int
    direction: Direction = "bidirectional"
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.n_heads < 1:
            raise ValueError(f"n_heads must be at least 1, got {self.n_heads}.")
        if self.direction not in ("bidirectional", "causal"):
            raise ValueError(f"Attention is 'bidirectional' or 'causal', got {self.direction!r}.")
        if self.rope_base <= 0:
            raise ValueError(f"rope_base must be positive, got {self.rope_base}.")


def check_block(*, d_model: int, attention: AttentionSettings | None, mlp_hidden: list[int] | None, name: str) -> None:
    """Raise a ValueError where the widths of a block of the ci function `name` do not fit together."""
    if d_model < 1:
        raise ValueError(f"{name}: d_model must be at least 1, got {d_model}.")
    if attention is not None and d_model % (2 * attention.n_heads):
        raise ValueError(
            f"{name}: RoPE turns pairs, so d_model must be a multiple of 2 * n_heads ="
            f" {2 * attention.n_heads}, got {d_model}."
        )
    if mlp_hidden is not None and (not mlp_hidden or any(h < 1 for h in mlp_hidden)):
        raise ValueError(f"{name}: the MLP of a block needs hidden widths >= 1, got {list(mlp_hidden)}.")


def rms_norm(x: Float[Tensor, "*leading d"]) -> Float[Tensor, "*leading d"]:
    """x / sqrt(mean(x^2) + 1e-6) over the last axis, without weight. Computed in float32 at the least."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)


def normed_together(inputs: Mapping[str, Float[Tensor, "*leading d"]]) -> Float[Tensor, "*leading width"]:
    """The inputs of several sites, each RMS-normed on its own, concatenated."""
    shapes = {site: tuple(x.shape[:-1]) for site, x in inputs.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"A ci function that reads several sites at once needs inputs with the same leading axes, got {shapes}."
            " Leave the sites that differ out of `sites`, or choose a ci function per site, such as SharedMLP."
        )
    return torch.cat([rms_norm(x) for x in inputs.values()], dim=-1)


def as_sequences(x: Float[Tensor, "*leading d"]) -> Float[Tensor, "batch sequence d"]:
    """`[*leading, sequence, d]` with its leading axes in one; `[batch, d]` as sequences of length 1 (spec I2)."""
    return x.reshape(-1, 1, x.shape[-1]) if x.ndim <= 2 else x.flatten(0, -3)


def split_sites(logits: Float[Tensor, "*leading total"], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Site -> its own columns."""
    return dict(zip(widths, logits.split(list(widths.values()), dim=-1), strict=True))


def linear(d_in: int, d_out: int, *, seed: int, name: str) -> MLP:
    """One linear layer with bias."""
    return MLP(widths=[d_in, d_out], seed=seed, name=name)


class SelfAttention(nn.Module):
    """W_o [softmax(q k^T / sqrt(d_head)) v] + b_o per head, with q and k turned by RoPE; q, k, v are linear in x."""

    def __init__(self, *, d_model: int, settings: AttentionSettings, seed: int, name: str):
        super().__init__()
        self.settings = settings
        self.qkv = linear(d_model, 3 * d_model, seed=seed, name=f"{name}/qkv")
        self.out = linear(d_model, d_model, seed=seed, name=f"{name}/out")

    def forward(self, x: Float[Tensor, "batch sequence d_model"]) -> Float[Tensor, "batch sequence d_model"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.settings.n_heads, -1)).transpose(1, 3).unbind(2)
        q, k = self.turned(q), self.turned(k)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=self.settings.direction == "causal")
        return self.out(z.transpose(1, 2).flatten(-2))

    def turned(self, x: Float[Tensor, "batch head sequence d_head"]) -> Float[Tensor, "batch head sequence d_head"]:
        """RoPE in float32 at the least, rounded once."""
        at_least = torch.promote_types(x.dtype, torch.float32)
        return rotate(x.to(at_least), base=self.settings.rope_base, angles=at_least).to(x.dtype)


class Block(nn.Module):
    """Pre-norm residual: x <- x + Attention(norm(x)), then x <- x + MLP(norm(x)); either part may be absent.

    With `checkpoint_activations` only x is kept for the backward, which computes the block a second time.
    """

    def __init__(
        self,
        *,
        d_model: int,
        attention: AttentionSettings | None,
        mlp_hidden: list[int] | None,
        checkpoint_activations: bool,
        seed: int,
        name: str,
    ):
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        self.attention = self.mlp = None
        if attention is not None:
            self.attention = SelfAttention(d_model=d_model, settings=attention, seed=seed, name=f"{name}/attention")
        if mlp_hidden is not None:
            self.mlp = MLP(widths=[d_model, *mlp_hidden, d_model], seed=seed, name=f"{name}/mlp")

    def forward(self, x: Float[Tensor, "batch sequence d_model"]) -> Float[Tensor, "batch sequence d_model"]:
        if not self.checkpoint_activations:
            return self.compute(x)
        # Autocast would keep its copies of the weights until the end of the forward; the backward makes them again.
        device = x.device.type
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            # Nothing in a block is random, and the state of the global generator is not ours to touch (spec D1).
            return checkpoint(self.compute, x, use_reentrant=False, preserve_rng_state=False)

    def compute(self, x: Float[Tensor, "batch sequence d_model"]) -> Float[Tensor, "batch sequence d_model"]:
        if self.attention is not None:
            x = x + self.attention(rms_norm(x))
        return x if self.mlp is None else x + self.mlp(rms_norm(x))
