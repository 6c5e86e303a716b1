"""Figures as evaluations: they gather what they draw over the evaluation batches (spec E5)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pdlightning import figures
from pdlightning import functional as pf
from pdlightning.metrics.evaluation import Evaluation, PositionSums, matching_sites
from pdlightning.metrics.probe import _OfTheModel, single_feature_ci
from pdlightning.modules.ci import site_key
from pdlightning.modules.component_model import ComponentModel
from pdlightning.observation import Observation

Order = Literal["identity", "dense", "none"]


def column_orders(ci: dict[str, Tensor], patterns: dict[str, Order]) -> dict[str, Tensor]:
    """site -> the order of its subcomponents: matched to the identity, by mass, or as they are."""
    orders = {"identity": pf.identity_matching, "dense": pf.dense_order, "none": lambda x: torch.arange(x.shape[1])}
    return {site: orders[patterns.get(site, "none")](value) for site, value in ci.items()}


class MeanCIFigure(PositionSums):
    """Mean ci per subcomponent, sorted, on a linear and a log scale."""

    draws = True

    def site_sum(self, observation: Observation, site: str) -> Tensor:
        return observation.ci.lower[site].flatten(0, -2).sum(0)

    def compute(self) -> dict[str, Figure]:
        means = self.means()
        return {scale: figures.plot_mean_ci(means, scale) for scale in ("linear", "log")}


class FiringDensityFigure(PositionSums):
    """How often each subcomponent fires: the share of positions with lower > threshold."""

    draws = True

    def __init__(self, *, threshold: float, **metric_arguments: Any):
        super().__init__(**metric_arguments)
        self.threshold = threshold

    def site_sum(self, observation: Observation, site: str) -> Tensor:
        return (observation.ci.lower[site] > self.threshold).flatten(0, -2).sum(0)

    def compute(self) -> dict[str, Figure]:
        return {"": figures.plot_firing_density(self.means(), self.threshold)}


class HistogramFigure(Evaluation):
    """Histogram of the lower ci, or of the logits, of all positions and subcomponents of each site.

    Args:
        quantity: what is counted.
        low, high: the range; what lies outside counts in the first and the last bin.
        bins: their number.
    """

    draws = True

    def __init__(
        self, *, quantity: Literal["lower", "logits"], low: float, high: float, bins: int = 100, **metric_arguments: Any
    ):
        super().__init__(**metric_arguments)
        if quantity not in ("lower", "logits") or not low < high or bins < 1:
            raise ValueError(
                f"HistogramFigure: quantity is lower or logits, low < high, bins >= 1;"
                f" got {quantity!r}, {low}, {high}, {bins}."
            )
        self.quantity, self.low, self.high, self.bins = quantity, low, high, bins

    def prepare(self, model: ComponentModel) -> None:
        self.sites = list(model.components)
        for site in self.sites:
            self.add_state(site_key(site), torch.zeros(self.bins), dist_reduce_fx="sum")

    def update(self, observation: Observation) -> None:
        values = observation.ci.lower if self.quantity == "lower" else observation.ci.logits
        for site in self.sites:
            inside = values[site].detach().float().clamp(self.low, self.high)
            getattr(self, site_key(site)).add_(torch.histc(inside, self.bins, self.low, self.high))

    def compute(self) -> dict[str, Figure]:
        edges = torch.linspace(self.low, self.high, self.bins + 1)
        words = "lower causal importance" if self.quantity == "lower" else "ci logit"
        counts = {site: (getattr(self, site_key(site)).cpu(), edges) for site in self.sites}
        return {"": figures.plot_histograms(counts, title=f"Histogram of {words}", quantity=words, scale="log")}


class SingleFeatureCIFigure(_OfTheModel):
    """Heat maps of the single-feature probe (spec E3), columns in the `order` of the site: identity, dense or none."""

    draws = True

    def __init__(self, *, n_features: int, order: dict[str, Order], **metric_arguments: Any):
        super().__init__(**metric_arguments)
        self.n_features, self.order = n_features, dict(order)

    def prepare(self, model: ComponentModel) -> None:
        for site in self.order:
            matching_sites(model, site)

    def compute(self) -> dict[str, Figure]:
        ci = single_feature_ci(self.model, self.n_features)
        return {"": figures.plot_single_feature_ci(ci, {s: self.order.get(s, "none") for s in ci})}


class ComponentWeightsFigure(SingleFeatureCIFigure):
    """V and U of every site as images, subcomponents in the matched order of the single-feature probe."""

    def compute(self) -> dict[str, Figure]:
        order = column_orders(single_feature_ci(self.model, self.n_features), self.order)
        V = {s: c.V.detach() for s, c in self.model.components.items()}
        U = {s: c.U.detach() for s, c in self.model.components.items()}
        return {"": figures.plot_component_weights(V, U, order)}


class VectorsFigure(_OfTheModel):
    """The columns of a site's weight beside those of its subcomponents: arrows in two dimensions (TMS).

    Subcomponents that fire for a single feature (ci > 0.1) are emphasised.
    """

    draws = True

    def __init__(self, *, site: str, n_features: int, **metric_arguments: Any):
        super().__init__(**metric_arguments)
        self.site, self.n_features = site, n_features

    def prepare(self, model: ComponentModel) -> None:
        matching_sites(model, self.site)

    def compute(self) -> dict[str, Figure]:
        c = self.model.components[self.site]
        firing = (single_feature_ci(self.model, self.n_features)[self.site] > 0.1).any(0)
        return {"": figures.plot_tms_vectors(c.target_weight, c.V.detach(), c.U.detach(), firing=firing)}


class NeuronContributionsFigure(_OfTheModel):
    """Residual MLP: what each neuron contributes to each feature, in the target and by the subcomponents of mlp_in.

    Args:
        n_features: of the target.
        mlp_in, mlp_out: fnmatch patterns of those sites, layer by layer.
    """

    draws = True

    def __init__(self, *, n_features: int, mlp_in: str, mlp_out: str, **metric_arguments: Any):
        super().__init__(**metric_arguments)
        self.n_features, self.mlp_in, self.mlp_out = n_features, mlp_in, mlp_out

    def prepare(self, model: ComponentModel) -> None:
        for pattern in (self.mlp_in, self.mlp_out):
            matching_sites(model, pattern)

    def compute(self) -> dict[str, Figure]:
        target, components = self.model.target, self.model.components
        ci = single_feature_ci(self.model, self.n_features)
        into, out = (matching_sites(self.model, pattern) for pattern in (self.mlp_in, self.mlp_out))
        figure = figures.plot_neuron_contributions_by_subcomponent(
            embedding=target.W_E,  # type: ignore[arg-type]
            unembedding=target.W_U,  # type: ignore[arg-type]
            mlp_in=[components[s].target_weight for s in into],
            mlp_out=[components[s].target_weight for s in out],
            V=[components[s].V.detach() for s in into],
            U=[components[s].U.detach() for s in into],
            ci=[ci[s] for s in into],
        )
        return {"": figure}
