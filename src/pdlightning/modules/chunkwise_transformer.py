"""`chunkwise_transformer`: one transformer for each group of consecutive blocks of the target (spec I2)."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from pdlightning.modules.ci import CIShape
from pdlightning.modules.global_transformer import TransformerCI
from pdlightning.modules.sequence_blocks import Direction
from pdlightning.modules.site_groups import Groups, check_groups, check_patterns, matching, site_groups


class ChunkwiseTransformer(TransformerCI):
    """`chunkwise_transformer`: the sites in groups, and for each group a transformer as in `GlobalTransformer`, from
    the inputs that the group taps to the logits of its own sites (spec I2).

    Args:
        groups: group -> patterns (fnmatch) of its sites; every site is in exactly one group. Or a number n: the blocks
            of the target (paths up to their first number) in n consecutive groups `group_0`, `group_1`, ...
        taps: group -> patterns of the sites whose inputs it reads; a group that is not named reads its own sites.
        d_model, n_blocks, n_heads, mlp_hidden, attention, rope_base, checkpoint_activations: of each transformer, as in
            `GlobalTransformer`.

    Raises:
        ValueError: when it is built for its sites: a pattern that matches none, a site in two groups or in none, more
            groups than blocks, or taps of a group that does not exist.
    """

    def __init__(
        self,
        *,
        groups: Groups,
        taps: Mapping[str, list[str]] | None = None,
        d_model: int,
        n_blocks: int,
        n_heads: int,
        mlp_hidden: list[int],
        attention: Direction = "bidirectional",
        rope_base: float = 10_000.0,
        checkpoint_activations: bool = False,
    ):
        super().__init__(
            d_model=d_model,
            n_blocks=n_blocks,
            n_heads=n_heads,
            mlp_hidden=mlp_hidden,
            attention=attention,
            rope_base=rope_base,
            checkpoint_activations=checkpoint_activations,
        )
        self.groups = check_groups(groups, name="ChunkwiseTransformer")
        self.taps = dict(taps or {})
        for group, patterns in self.taps.items():
            check_patterns(patterns, name=f"ChunkwiseTransformer: taps[{group!r}]")

    def build(self, shapes: Mapping[str, CIShape], *, seed: int) -> None:
        sites = list(shapes)
        groups = site_groups(sites, self.groups, name="ChunkwiseTransformer")
        if unknown := self.taps.keys() - groups.keys():
            raise ValueError(
                f"ChunkwiseTransformer: taps name {sorted(map(str, unknown))}, but the groups are {list(groups)}."
            )
        reads = groups | {
            group: matching(sites, patterns, name=f"ChunkwiseTransformer: taps[{group!r}]")
            for group, patterns in self.taps.items()
        }
        self.networks = nn.ModuleList(
            self.transformer(shapes, reads=reads[group], writes=own, seed=seed, name=f"chunkwise_transformer/{group}")
            for group, own in groups.items()
        )

    def forward(self, inputs: dict[str, Float[Tensor, "*leading d"]]) -> dict[str, Float[Tensor, "*leading C"]]:
        logits: dict[str, Tensor] = {}
        for network in self.networks:
            logits |= network(inputs)
        return {site: logits[site] for site in inputs}
