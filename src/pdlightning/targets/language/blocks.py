"""What the in-house language models are built of: rotary attention, MLPs, blocks, and the shell around them.

Parts know nothing of devices or of decomposition. The models differ only in what they put into `LanguageModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pdlightning.functional.attention import rotate, split_heads
from pdlightning.functional.random import key_generator
from pdlightning.targets.layers import normal_linear

INIT_STD = 0.02
"""Of every matrix; those that write into the residual stream have it divided by sqrt(2 n_layers) (GPT-2)."""


class InitialWeights:
    """Makes the matrices of one model, each drawn by the key (seed, its path)."""

    def __init__(self, *, seed: int, n_layers: int) -> None:
        self.seed = seed
        self.out_std = INIT_STD * (2 * n_layers) ** -0.5

    def linear(self, d_in: int, d_out: int, path: str, *, bias: bool) -> nn.Linear:
        return normal_linear(d_in, d_out, bias=bias, std=INIT_STD, generator=key_generator(self.seed, path))

    def out(self, d_in: int, d_out: int, path: str, *, bias: bool) -> nn.Linear:
        """A matrix that writes into the residual stream."""
        return normal_linear(d_in, d_out, bias=bias, std=self.out_std, generator=key_generator(self.seed, path))

    def embedding(self, rows: int, d_model: int, path: str) -> nn.Embedding:
        # Given its weights, the embedding does not draw any from the global generator.
        weight = torch.randn(rows, d_model, generator=key_generator(self.seed, path)) * INIT_STD
        return nn.Embedding(rows, d_model, _weight=weight)


class CausalAttention(nn.Module):
    """o_proj(softmax(q k^T / sqrt(d_head)) v) over the positions up to one's own, per head.

    Args:
        d_model, n_heads: width of the stream and heads in it; d_head = d_model / n_heads.
        n_kv_heads: heads of keys and values; each serves n_heads / n_kv_heads heads of queries (GQA).
        bias: of all four projections.
        rope_base: of the rotary positions of queries and keys, or None where positions are in the stream.
        init: of the weights.
        path: of this module in the model.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        bias: bool,
        rope_base: float | None,
        init: InitialWeights,
        path: str,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        d_kv = d_model // n_heads * n_kv_heads
        self.q_proj = init.linear(d_model, d_model, f"{path}.q_proj", bias=bias)
        self.k_proj = init.linear(d_model, d_kv, f"{path}.k_proj", bias=bias)
        self.v_proj = init.linear(d_model, d_kv, f"{path}.v_proj", bias=bias)
        self.o_proj = init.out(d_model, d_model, f"{path}.o_proj", bias=bias)
        self.rope_base = rope_base

    def forward(self, r: Float[Tensor, "*leading sequence d_model"]) -> Float[Tensor, "*leading sequence d_model"]:
        q = split_heads(self.q_proj(r), self.n_heads)
        k, v = (split_heads(project(r), self.n_kv_heads) for project in (self.k_proj, self.v_proj))
        if self.rope_base is not None:
            q, k = rotate(q, base=self.rope_base), rotate(k, base=self.rope_base)
        z = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.n_kv_heads != self.n_heads
        )
        return self.o_proj(z.transpose(-3, -2).flatten(-2))


class GeluMLP(nn.Module):
    """down_proj(gelu(c_fc(x))), GPT-2's tanh approximation of gelu."""

    def __init__(self, *, d_model: int, d_mlp: int, bias: bool, init: InitialWeights, path: str) -> None:
        super().__init__()
        self.c_fc = init.linear(d_model, d_mlp, f"{path}.c_fc", bias=bias)
        self.down_proj = init.out(d_mlp, d_model, f"{path}.down_proj", bias=bias)

    def forward(self, x: Float[Tensor, "*leading d_model"]) -> Float[Tensor, "*leading d_model"]:
        return self.down_proj(nn.functional.gelu(self.c_fc(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, *, d_model: int, d_mlp: int, bias: bool, init: InitialWeights, path: str) -> None:
        super().__init__()
        self.gate_proj = init.linear(d_model, d_mlp, f"{path}.gate_proj", bias=bias)
        self.up_proj = init.linear(d_model, d_mlp, f"{path}.up_proj", bias=bias)
        self.down_proj = init.out(d_mlp, d_model, f"{path}.down_proj", bias=bias)

    def forward(self, x: Float[Tensor, "*leading d_model"]) -> Float[Tensor, "*leading d_model"]:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """r + attn(norm_1(r)), and to that + mlp(norm_2(...))."""

    def __init__(self, *, norm_1: nn.Module, attn: CausalAttention, norm_2: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm_1, self.attn, self.norm_2, self.mlp = norm_1, attn, norm_2, mlp

    def forward(self, r: Float[Tensor, "*leading sequence d_model"]) -> Float[Tensor, "*leading sequence d_model"]:
        r = r + self.attn(self.norm_1(r))
        return r + self.mlp(self.norm_2(r))


class TiedHead(nn.Linear):
    """A linear layer without bias whose weight is an embedding's, at every moment: `weight is embedding.weight`.

    The weight is read when used and is no parameter here, so it is stored and trained once, and either module may be
    replaced in the model without the other noticing (spec C7).
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", None)
        # Inside a tuple, the embedding is not registered as a child of this layer.
        self.embedding = (embedding,)

    @property
    def weight(self) -> Float[Tensor, "vocab d_model"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.embedding[0].weight


class LanguageModel(nn.Module):
    """wte (and wpe, where positions are learned), blocks `h`, norm_f, tied lm_head: tokens to logits of the next one.

    Attributes:
        vocab_size: number of tokens.
        n_ctx: longest sequence.
    """

    def __init__(
        self,
        *,
        wte: nn.Embedding,
        wpe: nn.Embedding | None,
        h: Sequence[Block],
        norm_f: nn.Module,
        n_ctx: int,
    ) -> None:
        super().__init__()
        self.vocab_size, self.n_ctx = wte.num_embeddings, n_ctx
        self.wte, self.wpe = wte, wpe
        self.h = nn.ModuleList(h)
        self.norm_f = norm_f
        self.lm_head = TiedHead(wte)

    def forward(self, tokens: Int[Tensor, "*leading sequence"]) -> Float[Tensor, "*leading sequence vocab"]:
        refuse_unfit(tokens, n_ctx=self.n_ctx, vocab_size=self.vocab_size)
        r = self.embedded(tokens)
        for block in self.h:
            r = block(r)
        return self.lm_head(self.norm_f(r))

    def embedded(self, tokens: Int[Tensor, "*leading sequence"]) -> Float[Tensor, "*leading sequence d_model"]:
        """The residual stream before the first block."""
        if self.wpe is None:
            return self.wte(tokens)
        # One row of positions per sequence, so that wpe too sees `[*leading, sequence]` and can be a site.
        positions = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
        return self.wte(tokens) + self.wpe(positions)


def refuse_unfit(tokens: Int[Tensor, "*leading sequence"], *, n_ctx: int, vocab_size: int) -> None:
    """ValueError for a sequence longer than the model's context, and for ids outside its vocabulary.

    Ids are looked at on the CPU alone: elsewhere the look would make the host wait, and every run is rehearsed there.
    """
    if tokens.shape[-1] > n_ctx:
        raise ValueError(
            f"The sequence has {tokens.shape[-1]} tokens, but this model was built for at most {n_ctx}: lower n_ctx of"
            " the data."
        )
    if tokens.device.type != "cpu" or torch.compiler.is_compiling() or not tokens.numel():
        return
    low, high = (int(x) for x in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"The tokens range from {low} to {high}, but this model knows 0 to {vocab_size - 1}: the data's tokenizer"
            " is not this model's."
        )


def check_sizes(**sizes: int) -> None:
    """ValueError for a size below 1, and for heads that do not divide what they should."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    _check_divides(sizes, "n_heads", "d_model")
    if "n_kv_heads" in sizes:
        _check_divides(sizes, "n_kv_heads", "n_heads")


def check_rotary(*, d_model: int, n_heads: int) -> None:
    """ValueError for heads of an odd width, which rotary positions cannot turn in pairs."""
    if d_model // n_heads % 2:
        raise ValueError(f"d_model / n_heads must be even for rotary positions, got {d_model} / {n_heads}.")


def _check_divides(sizes: Mapping[str, int], part: str, whole: str) -> None:
    if sizes[whole] % sizes[part]:
        raise ValueError(f"{whole} must be a multiple of {part} {sizes[part]}, got {sizes[whole]}.")
