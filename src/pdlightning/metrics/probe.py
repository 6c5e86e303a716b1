"""Evaluations against the known truth of a toy (spec E3, E4)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pdlightning import functional as pf
from pdlightning.metrics.evaluation import Evaluation, Results, matching_sites
from pdlightning.modules.component_model import ComponentModel
from pdlightning.observation import Observation

PROBE = 0.75


def single_feature_ci(model: ComponentModel, n_features: int) -> dict[str, Float[Tensor, "n_features C"]]:
    """The lower ci of every site for the inputs 0.75 * eye(n_features) (spec E3)."""
    some = next(iter(model.components.values())).V
    with torch.no_grad():
        probe = PROBE * torch.eye(n_features, device=some.device, dtype=some.dtype)
        return model.causal_importances(model.clean(probe)).lower


class _OfTheModel(Evaluation):
    """Base of the evaluations that look at the model, whatever the batch is."""

    model: ComponentModel

    def update(self, observation: Observation) -> None:
        object.__setattr__(self, "model", observation.model)  # not as a submodule: it is looked at, not owned


class IdentityError(_OfTheModel):
    """Errors against one subcomponent for each feature, over the sites of a pattern taken together (spec E3).

    Logged: `tol_<tolerance>` for every tolerance, and `recovered`: the features that have a
    subcomponent of their own at the first tolerance.
    """

    def __init__(
        self, *, sites: str, n_features: int, tolerances: tuple[float, ...] = (0.1, 0.2), **metric_arguments: Any
    ):
        super().__init__(**metric_arguments)
        self.pattern, self.n_features, self.tolerances = sites, n_features, tuple(tolerances)

    def prepare(self, model: ComponentModel) -> None:
        matching_sites(model, self.pattern)

    def compute(self) -> Results:
        by_site = single_feature_ci(self.model, self.n_features)
        ci = torch.cat([by_site[s] for s in matching_sites(self.model, self.pattern)], dim=-1)
        errors = {f"tol_{t:g}": torch.tensor(pf.identity_ci_error(ci, t)) for t in self.tolerances}
        return {**errors, "recovered": torch.tensor(pf.recovered_features(ci, self.tolerances[0]))}


class DenseError(_OfTheModel):
    """Errors against exactly k subcomponents that serve all features, for the one site of a pattern (spec E3)."""

    def __init__(
        self, *, site: str, k: int, n_features: int, tolerances: tuple[float, ...] = (0.1, 0.2), **metric_arguments: Any
    ):
        super().__init__(**metric_arguments)
        self.site, self.k, self.n_features, self.tolerances = site, k, n_features, tuple(tolerances)

    def prepare(self, model: ComponentModel) -> None:
        matching_sites(model, self.site)

    def compute(self) -> Results:
        ci = single_feature_ci(self.model, self.n_features)[self.site]
        errors = {f"tol_{t:g}": torch.tensor(pf.dense_ci_error(ci, self.k, t)) for t in self.tolerances}
        return {**errors, "firing": (ci > self.tolerances[0]).any(0).sum()}


class WeightMatch(_OfTheModel):
    """MMCS and ML2R of one site against the target's weight (spec E4).

    Args:
        site: its path.
        axis: "columns" of the target's (d_out, d_in) weight, one for each input, or its "rows", one for each output.
    """

    def __init__(self, *, site: str, axis: Literal["columns", "rows"], **metric_arguments: Any):
        super().__init__(**metric_arguments)
        if axis not in ("columns", "rows"):
            raise ValueError(f"WeightMatch(axis): expected columns or rows, got {axis!r}.")
        self.site, self.axis = site, axis

    def prepare(self, model: ComponentModel) -> None:
        matching_sites(model, self.site)

    def compute(self) -> Results:
        components = self.model.components[self.site]
        weight, V, U = components.target_weight, components.V.detach(), components.U.detach()
        if self.axis == "rows":
            weight, V, U = weight.T, U.T, V.T
        return {"mmcs": pf.mean_max_cosine_similarity(weight, V, U), "ml2r": pf.mean_l2_ratio(weight, V, U)}
