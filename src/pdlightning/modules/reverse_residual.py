"""`reverse_residual`: groups of the target's blocks read from late to early through a residual stream (spec I2)."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from pdlightning.modules.ci import CIFunction, CIShape
from pdlightning.modules.sequence_blocks import (
    AttentionSettings,
    Block,
    as_sequences,
    check_block,
    linear,
    normed_together,
    rms_norm,
    split_sites,
)
from pdlightning.modules.site_groups import Groups, check_groups, site_groups


class ReverseResidual(CIFunction):
    """`reverse_residual`: what matters early depends on what is done with it later, so the groups are read from the
    last, G, to the first, 1, and a residual stream r of width d_model carries what was read (spec I2):

    ```
    r_{G+1}  = 0
    r        = r_{g+1} + W_g [norm(x_s) for s in group g] + b_g
    r        = r + Attention_g(norm(r))                           with `attention`
    r_g      = r + MLP_g(norm(r))                                 with `transition_hidden`
    logits_g = H_g norm(r_g) + c_g, split into the sites of group g
    ```

    norm is the RMS norm without weight. Heads read the normed stream, because r grows from group to group. A group is
    later than another if its first site is.

    Args:
        groups: group -> patterns (fnmatch) of its sites; every site is in exactly one group. Or a number n: the blocks
            of the target (paths up to their first number) in n consecutive groups.
        d_model: width of the residual stream.
        attention: over the sequence, in every group; None for none: a ci then depends on its own position alone.
        transition_hidden: hidden widths of every group's GELU MLP; None for no MLP.
        checkpoint_activations: keep only what enters a group's attention and MLP, and compute these again in the
            backward.

    Raises:
        ValueError: when it is built for its sites: a pattern that matches none, a site in two groups or in none, or
            more groups than blocks.
    """

    def __init__(
        self,
        *,
        groups: Groups,
        d_model: int,
        attention: AttentionSettings | None = None,
        transition_hidden: list[int] | None = None,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        check_block(d_model=d_model, attention=attention, mlp_hidden=transition_hidden, name="ReverseResidual")
        self.groups = check_groups(groups, name="ReverseResidual")
        self.d_model, self.attention, self.transition_hidden = d_model, attention, transition_hidden
        self.checkpoint_activations = checkpoint_activations

    def build(self, shapes: Mapping[str, CIShape], *, seed: int) -> None:
        groups = site_groups(list(shapes), self.groups, name="ReverseResidual")
        self.stages = nn.ModuleList(
            self.stage({site: shapes[site] for site in groups[group]}, seed=seed, name=f"reverse_residual/{group}")
            for group in reversed(groups)
        )

    def stage(self, shapes: Mapping[str, CIShape], *, seed: int, name: str) -> Stage:
        block = Block(
            d_model=self.d_model,
            attention=self.attention,
            mlp_hidden=self.transition_hidden,
            checkpoint_activations=self.checkpoint_activations,
            seed=seed,
            name=name,
        )
        return Stage(shapes=shapes, d_model=self.d_model, block=block, seed=seed, name=name)

    def forward(self, inputs: dict[str, Float[Tensor, "*leading d"]]) -> dict[str, Float[Tensor, "*leading C"]]:
        logits: dict[str, Tensor] = {}
        stream = None
        for stage in self.stages:
            stream, of_group = stage(stream, inputs)
            logits |= of_group
        return {site: logits[site] for site in inputs}


class Stage(nn.Module):
    """One group: takes the stream of the later groups (None before the last), gives its own and the group's logits."""

    def __init__(self, *, shapes: Mapping[str, CIShape], d_model: int, block: Block, seed: int, name: str):
        super().__init__()
        self.writes = {site: shape.C for site, shape in shapes.items()}
        self.read = linear(sum(shape.d_in for shape in shapes.values()), d_model, seed=seed, name=f"{name}/read")
        self.block = block
        self.head = linear(d_model, sum(self.writes.values()), seed=seed, name=f"{name}/head")

    def forward(
        self, stream: Float[Tensor, "batch sequence d_model"] | None, inputs: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "batch sequence d_model"], dict[str, Tensor]]:
        x = normed_together({site: inputs[site] for site in self.writes})
        read = self.read(as_sequences(x))
        carried: Tensor = self.block(read if stream is None else stream + read)
        logits = self.head(rms_norm(carried)).reshape(*x.shape[:-1], -1)
        return carried, split_sites(logits, self.writes)
