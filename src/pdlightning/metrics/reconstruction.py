"""A reconstruction loss is (source x routing x comparison) (spec 4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pdlightning.functional.losses import Pair
from pdlightning.masking import Masks, Route, Routing, Source
from pdlightning.metrics.comparisons import Comparison
from pdlightning.metrics.loss import Loss
from pdlightning.observation import Observation
from pdlightning.schedules import Value


def compare_masked(observation: Observation, route: Route, masks: Masks, comparison: Comparison) -> Pair:
    """One masked forward and its distance from the clean one."""
    masked = observation.model.masked(
        observation.batch,
        masks.masks,
        delta_masks=masks.delta_masks,
        routes=route.routes,
        outputs=comparison.needs_outputs,
        clean=observation.clean,
    )
    return comparison(observation.clean, masked)


class ReconstructionLoss(Loss):
    """How far the output moves when the masks leave out what ci does not claim (spec R1-R5).

    StochasticRecon is Uniform x AllSites, ...Layerwise Uniform x EachSite, ...Subset Uniform x UniformSubset,
    CIMaskedRecon Constant(0), UnmaskedRecon Constant(1), PGDRecon PGD; HiddenActs any of them x HiddenMSE.
    """

    def __init__(
        self, *, coeff: Value, source: Source, routing: Routing, comparison: Comparison, **metric_arguments: Any
    ):
        super().__init__(coeff=coeff, **metric_arguments)
        self.source, self.routing, self.comparison = source, routing, comparison
        self.needs_outputs = comparison.needs_outputs

    def measure(self, observation: Observation) -> Pair:
        total, count = None, 0
        for route in self.routing(observation, term=self.term):

            def loss(masks: Masks, route: Route = route) -> Tensor:
                value, n = compare_masked(observation, route, masks, self.comparison)
                return value / n

            masks = self.source(observation, term=self.term, sites=route.sites, loss=loss)
            value, n = compare_masked(observation, route, masks, self.comparison)
            total, count = value if total is None else total + value, count + n
        if total is None:
            raise RuntimeError(f"{type(self.routing).__name__} gave no route for the term {self.term!r}.")
        return total, count
