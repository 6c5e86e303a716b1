"""GPT-2 with plain linear layers: learned positions, biases, LayerNorm or no norm at all, tied embedding."""

from __future__ import annotations

from typing import Literal

from torch import nn

from pdlightning.targets.language.blocks import (
    Block,
    CausalAttention,
    GeluMLP,
    InitialWeights,
    LanguageModel,
    check_sizes,
)


class GPT2Simple(LanguageModel):
    """r = wte + wpe; blocks r += attn(norm_1(r)); r += mlp(norm_2(r)), then logits = norm_f(r) wte^T.

    transformers' GPT2LMHeadModel, with its fused `c_attn` as three matrices.

    Matrices: `wte`, `wpe`, `h.<i>.attn.{q,k,v,o}_proj`, `h.<i>.mlp.{c_fc,down_proj}`, `lm_head` (wte's weight).

    Args:
        vocab_size: number of tokens.
        n_ctx: longest sequence.
        d_model: width of the residual stream.
        n_layers: blocks.
        n_heads: heads per block; divides d_model.
        d_mlp: neurons per block.
        norm: `layer` as published; `none` leaves every norm out.
        seed: key of the initial weights.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        n_ctx: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        d_mlp: int,
        norm: Literal["layer", "none"],
        seed: int,
    ) -> None:
        check_sizes(
            vocab_size=vocab_size, n_ctx=n_ctx, d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_mlp=d_mlp
        )
        if norm not in ("layer", "none"):
            raise ValueError(f"norm must be layer or none, got {norm!r}.")
        init = InitialWeights(seed=seed, n_layers=n_layers)

        def normed() -> nn.Module:
            return nn.LayerNorm(d_model, eps=1e-5) if norm == "layer" else nn.Identity()

        def block(path: str) -> Block:
            return Block(
                norm_1=normed(),
                attn=CausalAttention(
                    d_model=d_model,
                    n_heads=n_heads,
                    n_kv_heads=n_heads,
                    bias=True,
                    rope_base=None,
                    init=init,
                    path=f"{path}.attn",
                ),
                norm_2=normed(),
                mlp=GeluMLP(d_model=d_model, d_mlp=d_mlp, bias=True, init=init, path=f"{path}.mlp"),
            )

        super().__init__(
            wte=init.embedding(vocab_size, d_model, "wte"),
            wpe=init.embedding(n_ctx, d_model, "wpe"),
            h=[block(f"h.{i}") for i in range(n_layers)],
            norm_f=normed(),
            n_ctx=n_ctx,
        )
