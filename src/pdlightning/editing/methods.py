"""What one does with a decomposition by hand: run it, probe it, intervene in it, and write an edited model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pdlightning.editing.edits import Amount, Indices, Values
from pdlightning.editing.exporting import export
from pdlightning.editing.interventions import Intervention
from pdlightning.modules.ci import CausalImportances
from pdlightning.modules.component_model import ComponentModel
from pdlightning.ranks import refuse_parts


class Editing:
    """The methods of `ParameterDecomposition` for this; `docs/editing.md` shows them at work."""

    model: ComponentModel

    def forward(self, batch: Any) -> Tensor:
        """The output of the target, edited by the interventions that are open."""
        return self.model.output(self.model.run_batch(self.model.target, batch))

    @torch.no_grad()
    def causal_importances(self, batch: Any) -> CausalImportances:
        """`.lower`, `.upper`, `.logits`: dict site -> `[*leading, C]` (spec I1), without gradient."""
        refuse_parts(self.model.components)
        return self.model.causal_importances(self.model.clean(batch))

    @torch.no_grad()
    def component_activations(self, batch: Any) -> dict[str, Float[Tensor, "*leading C"]]:
        """x V of every site, the row V[x] of an embedding (spec C1), without gradient."""
        refuse_parts(self.model.components)
        return {path: products.with_V() for path, products in self.model.clean(batch).products.items()}

    def masked_forward(
        self,
        batch: Any,
        masks: dict[str, Float[Tensor, "*leading C"]],
        delta_masks: dict[str, Float[Tensor, " *leading"]] | None = None,
        routes: dict[str, Bool[Tensor, " *leading"]] | None = None,
    ) -> Tensor:
        """The output when exactly the sites in `masks` run through their masked subcomponents (spec C4-C6)."""
        refuse_parts(self.model.components)
        return self.model.masked(batch, masks, delta_masks=delta_masks, routes=routes).output

    def masked(
        self,
        *,
        keep: Mapping[str, Indices] | None = None,
        ablate: Mapping[str, Indices] | None = None,
        scale: Mapping[str, Values] | None = None,
        add: Mapping[str, Values] | None = None,
        delta: Amount | Mapping[str, Amount] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        V: Mapping[str, Values] | None = None,
        U: Mapping[str, Values] | None = None,
        positions: Sequence[int] | Tensor | None = None,
    ) -> Intervention:
        """`with pd.masked(ablate={site: [3]}):` every call of the target inside runs without subcomponent 3.

        `keep` and `ablate` choose subcomponents, `scale` and `add` change their masks, `delta` that of the weight
        delta, `V` and `U` replace their vectors; `masks` is what to start from, the target's own weight by default, and
        `positions` where. `Intervention` says each of them exactly.
        """
        return Intervention(
            self.model,
            keep=keep,
            ablate=ablate,
            scale=scale,
            add=add,
            delta=delta,
            masks=masks,
            V=V,
            U=U,
            positions=positions,
        )

    def export(
        self,
        batch: Any,
        *,
        path: str | Path | None = None,
        keep: Mapping[str, Indices] | None = None,
        ablate: Mapping[str, Indices] | None = None,
        scale: Mapping[str, Values] | None = None,
        add: Mapping[str, Values] | None = None,
        delta: Amount | Mapping[str, Amount] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        V: Mapping[str, Values] | None = None,
        U: Mapping[str, Values] | None = None,
    ) -> nn.Module:
        """A copy of the target with no site in it, whose weights do what `masked` does with the same arguments.

        On `batch` both are compared, and a difference is refused. With `path` the copy is written there too;
        `exporting.export` says in what form.
        """
        intervention = self.masked(keep=keep, ablate=ablate, scale=scale, add=add, delta=delta, masks=masks, V=V, U=U)
        return export(intervention, batch, path=path)
