"""The base of evaluations that are no losses, and the ones that count (spec E1, E5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pdlightning import functional as pf
from pdlightning.metrics.states import FullPrecisionMetric
from pdlightning.modules.ci import site_key
from pdlightning.modules.component_model import ComponentModel
from pdlightning.observation import Observation

if TYPE_CHECKING:  # numbers need no matplotlib
    from matplotlib.figure import Figure

Results = dict[str, Tensor]


class Page(str):
    """One self-contained HTML file; an evaluation draws it as it draws a figure."""


class Data(dict[str, Any]):
    """What a figure is drawn from, as plain values: a JSON file beside it. `kind` says what it holds."""


Drawn = Mapping[str, "Figure | Page | Data"]


def significant(x: Tensor) -> Any:
    """The numbers of a tensor as (lists of) floats of five significant digits."""
    if x.ndim:
        return [significant(row) for row in x] if x.ndim > 1 else [float(f"{v:.5g}") for v in x.tolist()]
    return float(f"{x.item():.5g}")


class Evaluation(FullPrecisionMetric):
    """Updated with observations of the evaluation batches; `compute` gives named numbers, or what it `draws`.

    An empty name stands for the evaluation itself: `{"": x}` is logged under the key the evaluation has. `decode` turns
    neighbouring token ids into the text of each; None where the data are no text.
    """

    needs_outputs = False
    draws = False
    decode: Callable[[Sequence[int]], list[str]] | None = None

    def __init__(self, **metric_arguments: Any):
        super().__init__(**metric_arguments)
        self.term = type(self).__name__

    def prepare(self, model: ComponentModel) -> None:
        """Called once with the model, before any observation: make the states that depend on its sites."""

    def check(self, observation: Observation) -> None:
        """Refuse, with a ValueError, what can be seen to be wrong before any training."""

    def update(self, observation: Observation) -> None:
        raise NotImplementedError(f"{type(self).__name__} must take an observation in update.")

    def compute(self) -> Results | Drawn:
        raise NotImplementedError(f"{type(self).__name__} must return named results from compute.")


def matching_sites(model: ComponentModel, pattern: str) -> list[str]:
    """The sites whose path fits an fnmatch pattern; an error lists them all where none does."""
    found = [site for site in model.components if fnmatchcase(site, pattern)]
    if not found:
        raise ValueError(f"Pattern {pattern!r} matches no site. The sites: {', '.join(model.components)}.")
    return found


class PositionSums(Evaluation):
    """Base of the evaluations that add something up over positions, site by site: `sums[site] / positions`."""

    positions: Tensor

    def site_sum(self, observation: Observation, site: str) -> Tensor:
        """What one observation adds for a site."""
        raise NotImplementedError(f"{type(self).__name__} must say what a site adds in site_sum.")

    def state_like(self, model: ComponentModel, site: str) -> Tensor:
        return torch.zeros(model.components[site].C)

    def prepare(self, model: ComponentModel) -> None:
        self.sites = list(model.components)
        self.add_state("positions", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        for site in self.sites:
            self.add_state(site_key(site), self.state_like(model, site), dist_reduce_fx="sum")

    def update(self, observation: Observation) -> None:
        for site in self.sites:
            getattr(self, site_key(site)).add_(self.site_sum(observation, site))
        self.positions += observation.leading_size

    def means(self) -> dict[str, Tensor]:
        return {site: getattr(self, site_key(site)) / self.positions for site in self.sites}


class CIL0(PositionSums):
    """Mean over positions of #(lower > threshold), per site, per named group of sites, and in total (spec E1).

    Args:
        threshold: part of the logged name, as in `ci_l0_0.1`.
        groups: name -> fnmatch pattern of sites.
    """

    def __init__(self, *, threshold: float, groups: dict[str, str] | None = None, **metric_arguments: Any):
        super().__init__(**metric_arguments)
        self.threshold, self.groups = threshold, groups or {}

    def state_like(self, model: ComponentModel, site: str) -> Tensor:
        return torch.zeros(())

    def prepare(self, model: ComponentModel) -> None:
        super().prepare(model)
        self.members = {name: matching_sites(model, pattern) for name, pattern in self.groups.items()}

    def site_sum(self, observation: Observation, site: str) -> Tensor:
        return pf.l0(observation.ci.lower[site], self.threshold).sum()

    def compute(self) -> Results:
        by_site = self.means()
        groups = {name: torch.stack([by_site[s] for s in sites]).sum() for name, sites in self.members.items()}
        return {**by_site, **groups, "total": torch.stack(list(by_site.values())).sum()}


class ActiveSubcomponents(PositionSums):
    """How many subcomponents have a mean lower ci above `threshold`, per site and in total.

    Args:
        threshold: of the mean over positions; part of the logged name, as in `active_0.001`.
    """

    def __init__(self, *, threshold: float, **metric_arguments: Any):
        super().__init__(**metric_arguments)
        self.threshold = threshold

    def site_sum(self, observation: Observation, site: str) -> Tensor:
        return observation.ci.lower[site].flatten(0, -2).sum(0)

    def compute(self) -> Results:
        by_site = {site: (mean > self.threshold).sum() for site, mean in self.means().items()}
        return {**by_site, "total": torch.stack(list(by_site.values())).sum()}


class HiddenActsError(PositionSums):
    """Mean squared error of each site's output under the ci masking, per element (spec E5)."""

    needs_outputs = True

    def state_like(self, model: ComponentModel, site: str) -> Tensor:
        return torch.zeros(())

    def update(self, observation: Observation) -> None:
        masked = observation.model.masked(
            observation.batch, observation.ci.lower, outputs=True, clean=observation.clean
        )
        for site in self.sites:
            total, _ = pf.squared_error(observation.clean.outputs[site], masked.outputs[site])
            getattr(self, site_key(site)).add_(total / masked.outputs[site].shape[-1])
        self.positions += observation.leading_size

    def compute(self) -> Results:
        return self.means()
