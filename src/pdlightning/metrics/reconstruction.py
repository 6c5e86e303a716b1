"""A reconstruction loss is (source x routing x comparison) (spec 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pdlightning.functional.losses import Pair
from pdlightning.masking import Masks, Route, Routing, Source
from pdlightning.metrics.comparisons import Comparison
from pdlightning.metrics.loss import Loss
from pdlightning.modules.component_model import ComponentModel
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
    CIMaskedRecon Constant(0), UnmaskedRecon Constant(1), PGDRecon PGD, PersistentPGDRecon PersistentPGD; HiddenActs any
    of them x HiddenMSE.
    """

    def __init__(
        self, *, coeff: Value, source: Source, routing: Routing, comparison: Comparison, **metric_arguments: Any
    ):
        super().__init__(coeff=coeff, **metric_arguments)
        self.source, self.routing, self.comparison = source, routing, comparison
        self.needs_outputs = comparison.needs_outputs or routing.starts_late

    def prepare(self, model: ComponentModel) -> None:
        self.source.prepare(model)
        self.comparison.prepare(model)

    def check(self, observation: Observation) -> None:
        self.comparison.check(observation)

    def check_batch(self, samples: int) -> None:
        self.source.check_batch(samples)

    def check_training(self, *, micro_batches: int, loss_scaled: bool) -> None:
        self.source.check_training(micro_batches=micro_batches, loss_scaled=loss_scaled)

    def after_backward(self) -> None:
        if self.trained and self.coeff.number != 0:
            self.source.after_backward(weight=self.coeff.number)

    def warm_up(self, observation: Observation) -> None:
        def value(key: str, masks: Callable[[list[str]], Masks]) -> Tensor:
            return ratio(self.over_routes(observation, key, lambda route: masks(route.sites)))

        self.source.warm_up(observation, term=self.term, value=value)

    def measure(self, observation: Observation) -> Pair:
        def masks(route: Route) -> Masks:
            def loss(masks: Masks) -> Tensor:
                return ratio(compare_masked(observation, route, masks, self.comparison))

            return self.source(observation, term=self.term, sites=route.sites, loss=loss)

        return self.over_routes(observation, self.term, masks)

    def over_routes(self, observation: Observation, key: str, masks: Callable[[Route], Masks]) -> Pair:
        """The pairs of all forwards of the routing drawn under `key`, added up (spec R4)."""
        total, count = None, 0
        for route in self.routing(observation, term=key):
            value, n = compare_masked(observation, route, masks(route), self.comparison)
            total, count = value if total is None else total + value, count + n
        if total is None:
            raise RuntimeError(f"{type(self.routing).__name__} gave no route for the term {self.term!r}.")
        return total, count


def ratio(pair: Pair) -> Tensor:
    total, count = pair
    return total / count
