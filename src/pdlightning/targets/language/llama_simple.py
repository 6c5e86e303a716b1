"""A Llama as published: gated MLP, grouped-query attention."""

from __future__ import annotations

from pdlightning.targets.language.blocks import SwiGLU
from pdlightning.targets.language.llama import Llama


class LlamaSimple(Llama):
    """`Llama` with mlp(x) = down_proj(silu(gate_proj(x)) * up_proj(x)); transformers' LlamaForCausalLM, embedding tied.

    Matrices: `wte`, `h.<i>.attn.{q,k,v,o}_proj`, `h.<i>.mlp.{gate,up,down}_proj`, `lm_head` (wte's weight).
    """

    mlp_kind = SwiGLU
