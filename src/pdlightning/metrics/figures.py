"""Figures as evaluations: they gather what they draw over the evaluation batches (spec E5)."""

from __future__ import annotations

import fnmatch
from typing import Any, Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from pdlightning import figures
from pdlightning import functional as pf
from pdlightning.figures.probe import column_order
from pdlightning.metrics.evaluation import Data, Evaluation, PositionSums, matching_sites, significant
from pdlightning.metrics.probe import _OfTheModel, single_feature_ci
from pdlightning.modules.ci import site_key
from pdlightning.modules.component_model import ComponentModel
from pdlightning.observation import Observation

Order = Literal["identity", "dense", "none"]
TOGETHER = " together"


def column_orders(ci: dict[str, Tensor], patterns: dict[str, Order]) -> dict[str, Tensor]:
    """site -> the order of its subcomponents: matched to the identity, by mass, or as they are.

    The sites of one `identity` pattern are matched to the features together, then each keeps its own part.
    """
    orders = {site: torch.arange(values.shape[1]) for site, values in ci.items()}
    for pattern, how in patterns.items():
        sites = fnmatch.filter(ci, pattern)
        if how == "dense":
            orders |= {site: pf.dense_order(ci[site]) for site in sites}
        elif how == "identity":
            matched, first = pf.identity_matching(torch.cat([ci[s] for s in sites], dim=-1)), 0
            for site in sites:
                beyond = first + ci[site].shape[1]
                orders[site] = matched[(matched >= first) & (matched < beyond)] - first
                first = beyond
    return orders


def joined(ci: dict[str, Tensor], patterns: dict[str, Order]) -> tuple[dict[str, Tensor], dict[str, Order]]:
    """The panels of a probe and their order: what one `identity` pattern names is one truth, so one panel."""
    panels, order = dict(ci), dict.fromkeys(ci, "none")
    for pattern, how in patterns.items():
        sites = fnmatch.filter(ci, pattern)
        order |= dict.fromkeys(sites, how)
        if how == "identity" and len(sites) > 1:
            panels[pattern + TOGETHER] = torch.cat([panels.pop(s) for s in sites], dim=-1)
            order[pattern + TOGETHER] = how
    return panels, {name: order[name] for name in panels}  # type: ignore[misc]


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


class L0ByPositionFigure(Evaluation):
    """Mean number of subcomponents with lower > threshold at each position of a sequence, per site and in total.

    The position is the last leading axis. Sequences may differ in length; each position has its own count.
    """

    draws = True
    sequences: Tensor

    def __init__(self, *, threshold: float, **metric_arguments: Any):
        super().__init__(**metric_arguments)
        self.threshold = threshold

    def prepare(self, model: ComponentModel) -> None:
        self.sites = list(model.components)
        for name in ("sequences", *map(site_key, self.sites)):
            self.add_state(name, torch.zeros(0), dist_reduce_fx="sum")  # as long as the longest sequence so far

    def check(self, observation: Observation) -> None:
        if len(observation.leading) < 2:
            raise ValueError(
                "L0ByPositionFigure needs sequences: positions [*batch, sequence], but those of this batch are"
                f" {observation.leading}. Leave the metric out for a target of vectors."
            )

    def update(self, observation: Observation) -> None:
        self.check(observation)
        length = observation.leading[-1]
        counts = {"sequences": torch.full((length,), observation.leading_size / length, device=self.sequences.device)}
        for site in self.sites:
            firing = (observation.ci.lower[site] > self.threshold).sum(-1)
            counts[site_key(site)] = firing.reshape(-1, length).sum(0).to(self.sequences)
        for name, value in counts.items():
            have = getattr(self, name)
            width = max(len(have), length)
            setattr(self, name, F.pad(have, (0, width - len(have))) + F.pad(value, (0, width - length)))

    def compute(self) -> dict[str, Figure]:
        l0 = {site: getattr(self, site_key(site)) / self.sequences for site in self.sites}
        return {"": figures.plot_l0_by_position(l0, self.threshold)}


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


def copied(x: Tensor) -> Tensor:
    """For numpy: a sharded model could not free the memory of a parameter that numpy has looked at."""
    return x.detach().clone()


class SingleFeatureCIFigure(_OfTheModel):
    """Heat maps of the single-feature probe (spec E3).

    `order`: fnmatch pattern of sites -> how their columns are arranged: identity (matched to the features over all
    sites of the pattern together), dense (by mass) or none.
    """

    draws = True

    def __init__(self, *, n_features: int, order: dict[str, Order], **metric_arguments: Any):
        super().__init__(**metric_arguments)
        self.n_features, self.order = n_features, dict(order)

    def prepare(self, model: ComponentModel) -> None:
        for site in self.order:
            matching_sites(model, site)

    def compute(self) -> dict[str, Figure | Data]:
        by_site = single_feature_ci(self.model, self.n_features)
        panels, order = joined(by_site, self.order)
        shown = {}
        for name, ci in panels.items():
            columns = column_order(ci, order[name], name)
            sites = [name] if name in by_site else fnmatch.filter(by_site, name.removesuffix(TOGETHER))
            widths = {site: by_site[site].shape[1] for site in sites}
            ordered = {"order": order[name], "columns": columns.tolist(), "ci": significant(ci[:, columns])}
            shown[name] = {"sites": widths, **ordered}
        return {"": figures.plot_single_feature_ci(panels, order), "data": Data(kind="probe", panels=shown)}


class ComponentWeightsFigure(SingleFeatureCIFigure):
    """V and U of every site as images, subcomponents in the matched order of the single-feature probe."""

    def compute(self) -> dict[str, Figure | Data]:
        order = column_orders(single_feature_ci(self.model, self.n_features), self.order)
        V = {s: copied(c.V) for s, c in self.model.components.items()}
        U = {s: copied(c.U) for s, c in self.model.components.items()}
        matched = {site: columns.tolist() for site, columns in order.items()}
        return {"": figures.plot_component_weights(V, U, order), "data": Data(kind="weights", order=matched)}


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
        return {"": figures.plot_tms_vectors(c.target_weight, copied(c.V), copied(c.U), firing=firing)}


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
            V=[copied(components[s].V) for s in into],
            U=[copied(components[s].U) for s in into],
            ci=[ci[s] for s in into],
        )
        return {"": figure}
