"""The Llama stack, but for its MLP: RMSNorm, rotary positions, grouped-query attention, no biases, tied embedding."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from pdlightning.targets.language.blocks import (
    Block,
    CausalAttention,
    GeluMLP,
    InitialWeights,
    LanguageModel,
    SwiGLU,
    check_rotary,
    check_sizes,
)


class Llama(LanguageModel):
    """Blocks r += attn(norm_1(r)); r += mlp(norm_2(r)), then logits = norm_f(r) wte^T.

    A subclass says which MLP.

    Args:
        vocab_size: number of tokens.
        n_ctx: longest sequence.
        d_model: width of the residual stream.
        n_layers: blocks.
        n_heads: heads per block; divides d_model into even widths.
        d_mlp: neurons per block.
        seed: key of the initial weights.
        n_kv_heads: heads of keys and values (GQA); divides n_heads. None: as many as n_heads.
        rope_base: the slowest rotary angle is about 1 / rope_base per position.
        norm_eps: added to the mean square inside each RMSNorm.
    """

    mlp_kind: ClassVar[type[GeluMLP] | type[SwiGLU]]

    def __init__(
        self,
        *,
        vocab_size: int,
        n_ctx: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        d_mlp: int,
        seed: int,
        n_kv_heads: int | None = None,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-6,
    ) -> None:
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        check_sizes(
            vocab_size=vocab_size,
            n_ctx=n_ctx,
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_mlp=d_mlp,
        )
        check_rotary(d_model=d_model, n_heads=n_heads)
        init = InitialWeights(seed=seed, n_layers=n_layers)

        def block(path: str) -> Block:
            return Block(
                norm_1=nn.RMSNorm(d_model, eps=norm_eps),
                attn=CausalAttention(
                    d_model=d_model,
                    n_heads=n_heads,
                    n_kv_heads=n_kv_heads,
                    bias=False,
                    rope_base=rope_base,
                    init=init,
                    path=f"{path}.attn",
                ),
                norm_2=nn.RMSNorm(d_model, eps=norm_eps),
                mlp=self.mlp_kind(d_model=d_model, d_mlp=d_mlp, bias=False, init=init, path=f"{path}.mlp"),
            )

        super().__init__(
            wte=init.embedding(vocab_size, d_model, "wte"),
            wpe=None,
            h=[block(f"h.{i}") for i in range(n_layers)],
            norm_f=nn.RMSNorm(d_model, eps=norm_eps),
            n_ctx=n_ctx,
        )
