"""A small attention-only transformer that learns an induction head (spec 9)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pdlightning.functional.random import key_generator
from pdlightning.targets.layers import normal_linear


class CausalAttention(nn.Module):
    """o_proj(softmax(q k^T / sqrt(d_head)) v) over the positions up to one's own, per head; no biases."""

    def __init__(self, *, d_model: int, n_heads: int, seed: int, name: str) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            normal_linear(d_model, d_model, bias=False, std=d_model**-0.5, generator=key_generator(seed, name, part))
            for part in ("q_proj", "k_proj", "v_proj", "o_proj")
        )

    def forward(self, r: Float[Tensor, "*leading sequence d_model"]) -> Float[Tensor, "*leading sequence d_model"]:
        z = self.pattern(r) @ self.heads(self.v_proj(r))
        return self.o_proj(z.transpose(-3, -2).flatten(-2))

    def pattern(self, r: Float[Tensor, "*leading sequence d_model"]) -> Float[Tensor, "*leading head query key"]:
        """Attention probabilities: rows sum to 1, and are 0 for later keys."""
        q, k = self.heads(self.q_proj(r)), self.heads(self.k_proj(r))
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=r.device).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1)

    def heads(self, x: Float[Tensor, "*leading sequence d_model"]) -> Float[Tensor, "*leading head sequence d_head"]:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)


class AttentionBlock(nn.Module):
    """r + attn(r)."""

    def __init__(self, *, attn: CausalAttention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, r: Float[Tensor, "*leading sequence d_model"]) -> Float[Tensor, "*leading sequence d_model"]:
        return r + self.attn(r)


class InductionTransformer(nn.Module):
    """Token embedding + sinusoidal positions, attention-only layers, linear unembedding; no norms, no biases.

    Args:
        vocab: size of the alphabet.
        length: longest sequence.
        d_model: width of the residual stream, even.
        n_layers: attention layers.
        n_heads: heads per layer; divides d_model.
        seed: key of the initial weights.
    """

    positions: Tensor

    def __init__(self, *, vocab: int, length: int, d_model: int, n_layers: int, n_heads: int, seed: int) -> None:
        super().__init__()
        for name, value in zip(
            ("vocab", "length", "d_model", "n_layers", "n_heads"),
            (vocab, length, d_model, n_layers, n_heads),
            strict=True,
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if d_model % 2 or d_model % n_heads:
            raise ValueError(f"d_model must be even and a multiple of n_heads {n_heads}, got {d_model}.")
        self.length = length
        # Given its weights, the embedding does not draw any from the global generator.
        rows = torch.randn(vocab, d_model, generator=key_generator(seed, "embed"))
        self.embed = nn.Embedding(vocab, d_model, _weight=rows)
        self.register_buffer("positions", sinusoids(length, d_model), persistent=False)
        self.layers = nn.ModuleList(
            AttentionBlock(attn=CausalAttention(d_model=d_model, n_heads=n_heads, seed=seed, name=f"layers.{i}.attn"))
            for i in range(n_layers)
        )
        generator = key_generator(seed, "unembed")
        self.unembed = normal_linear(d_model, vocab, bias=False, std=d_model**-0.5, generator=generator)

    def forward(self, tokens: Int[Tensor, "*leading sequence"]) -> Float[Tensor, "*leading sequence vocab"]:
        r = self.embedded(tokens)
        for layer in self.layers:
            r = layer(r)
        return self.unembed(r)

    def embedded(self, tokens: Int[Tensor, "*leading sequence"]) -> Float[Tensor, "*leading sequence d_model"]:
        """The residual stream before the first layer."""
        sequence = tokens.shape[-1]
        if sequence > self.length:
            raise ValueError(f"The sequence has {sequence} tokens, but this model was built for at most {self.length}.")
        return self.embed(tokens) + self.positions[:sequence]

    def attention_patterns(self, tokens: Int[Tensor, "*leading sequence"]) -> list[Tensor]:
        """One `[*leading, head, query, key]` tensor of attention probabilities per layer."""
        r, patterns = self.embedded(tokens), []
        for layer in self.layers:
            assert isinstance(layer, AttentionBlock)
            patterns.append(layer.attn.pattern(r))
            r = layer(r)
        return patterns


def sinusoids(length: int, d: int) -> Float[Tensor, "length d"]:
    """sin(t w_i) in the even and cos(t w_i) in the odd columns, w_i = 10000^(-2i/d) (Vaswani et al. 2017)."""
    t = torch.arange(length, dtype=torch.float32).unsqueeze(-1)
    w = torch.exp(torch.arange(0, d, 2, dtype=torch.float32) * (-math.log(10000.0) / d))
    return torch.stack([torch.sin(t * w), torch.cos(t * w)], dim=-1).flatten(-2)
