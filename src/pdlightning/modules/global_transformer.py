"""`global_transformer`: one transformer over the sequence, from the inputs of all sites to all logits (spec I2)."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from pdlightning.modules.ci import CIFunction, CIShape
from pdlightning.modules.sequence_blocks import (
    AttentionSettings,
    Block,
    Direction,
    as_sequences,
    check_block,
    linear,
    normed_together,
    split_sites,
)


class SiteTransformer(nn.Module):
    """From the inputs of the sites `reads` (site -> width) to the logits of the sites `writes` (site -> C):

    ```
    h      = W_in [norm(x_s) for s in reads] + b_in
    h      = block_i(h) for every block
    logits = W_out h + b_out, split into the sites
    ```
    """

    def __init__(
        self,
        *,
        reads: Mapping[str, int],
        writes: Mapping[str, int],
        d_model: int,
        blocks: list[Block],
        seed: int,
        name: str,
    ):
        super().__init__()
        self.reads, self.writes = list(reads), dict(writes)
        self.read = linear(sum(reads.values()), d_model, seed=seed, name=f"{name}/read")
        self.blocks = nn.ModuleList(blocks)
        self.head = linear(d_model, sum(writes.values()), seed=seed, name=f"{name}/head")

    def forward(self, inputs: Mapping[str, Float[Tensor, "*leading d"]]) -> dict[str, Float[Tensor, "*leading C"]]:
        x = normed_together({site: inputs[site] for site in self.reads})
        h = self.read(as_sequences(x))
        for block in self.blocks:
            h = block(h)
        return split_sites(self.head(h).reshape(*x.shape[:-1], -1), self.writes)


class TransformerCI(CIFunction):
    """The settings that the transformers of a ci function share."""

    def __init__(
        self,
        *,
        d_model: int,
        n_blocks: int,
        n_heads: int,
        mlp_hidden: list[int],
        attention: Direction = "bidirectional",
        rope_base: float = 10_000.0,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        if n_blocks < 1:
            raise ValueError(f"{type(self).__name__}: n_blocks must be at least 1, got {n_blocks}.")
        self.attention = AttentionSettings(n_heads=n_heads, direction=attention, rope_base=rope_base)
        check_block(d_model=d_model, attention=self.attention, mlp_hidden=mlp_hidden, name=type(self).__name__)
        self.d_model, self.n_blocks, self.mlp_hidden = d_model, n_blocks, list(mlp_hidden)
        self.checkpoint_activations = checkpoint_activations

    def transformer(
        self, shapes: Mapping[str, CIShape], *, reads: list[str], writes: list[str], seed: int, name: str
    ) -> SiteTransformer:
        """The transformer that reads the inputs of some sites and writes the logits of others."""
        blocks = [
            Block(
                d_model=self.d_model,
                attention=self.attention,
                mlp_hidden=self.mlp_hidden,
                checkpoint_activations=self.checkpoint_activations,
                seed=seed,
                name=f"{name}/blocks/{i}",
            )
            for i in range(self.n_blocks)
        ]
        return SiteTransformer(
            reads={site: shapes[site].d_in for site in reads},
            writes={site: shapes[site].C for site in writes},
            d_model=self.d_model,
            blocks=blocks,
            seed=seed,
            name=name,
        )


class GlobalTransformer(TransformerCI):
    """`global_transformer`: the input of each site RMS-normed on its own, concatenated, projected to d_model, pre-norm
    blocks with RoPE attention and a GELU MLP, a head, split into the logits of the sites (spec I2).

    Args:
        d_model: width of the residual stream, a multiple of 2 * n_heads.
        n_blocks: blocks of attention and MLP.
        n_heads: attention heads.
        mlp_hidden: hidden widths of the MLP of a block.
        attention: "bidirectional", or "causal": a ci then depends on no later position.
        rope_base: RoPE turns pair i of a head by position * rope_base^(-2i / d_head).
        checkpoint_activations: keep only what enters a block, and compute the block again in the backward.
    """

    def build(self, shapes: Mapping[str, CIShape], *, seed: int) -> None:
        self.network = self.transformer(
            shapes, reads=list(shapes), writes=list(shapes), seed=seed, name="global_transformer"
        )

    def forward(self, inputs: dict[str, Float[Tensor, "*leading d"]]) -> dict[str, Float[Tensor, "*leading C"]]:
        return self.network(inputs)
