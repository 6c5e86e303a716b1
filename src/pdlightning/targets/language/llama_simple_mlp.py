"""A Llama with the plain MLP of GPT-2."""

from __future__ import annotations

from pdlightning.targets.language.blocks import GeluMLP
from pdlightning.targets.language.llama import Llama


class LlamaSimpleMLP(Llama):
    """`Llama` with mlp(x) = down_proj(gelu(c_fc(x))).

    Matrices: `wte`, `h.<i>.attn.{q,k,v,o}_proj`, `h.<i>.mlp.{c_fc,down_proj}`, `lm_head` (wte's weight).
    """

    mlp_kind = GeluMLP
