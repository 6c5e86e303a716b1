"""Two reconstruction terms in one forward: some samples meet an adversary, the others a drawn source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from pdlightning.functional.losses import Pair
from pdlightning.masking import EachSite, Masks, Route, Routing, Source
from pdlightning.metrics.comparisons import Comparison
from pdlightning.metrics.reconstruction import ReconstructionLoss, compare_masked, ratio
from pdlightning.observation import Observation
from pdlightning.schedules import Value


class MergedReconstructionLoss(ReconstructionLoss):
    """Each sample is adversarial with probability p, drawn by key for all its positions, else stochastic.

    One forward and one value over all samples instead of two terms. Who is adversarial stays the same for the warmups
    of a step; samples that are not give the adversary a gradient of 0.

    Args:
        p: probability of a sample to be adversarial.
        adversary: `PersistentPGD`, `ParticlePool` or `PGD`.
        adversary_routing: of the adversarial samples, such as `AllSites`.
        stochastic: source of the others, such as `Uniform`.
        stochastic_routing: of the others, such as `UniformSubset`.
    """

    def __init__(
        self,
        *,
        coeff: Value,
        p: float,
        adversary: Source,
        adversary_routing: Routing,
        stochastic: Source,
        stochastic_routing: Routing,
        comparison: Comparison,
        **metric_arguments: Any,
    ):
        super().__init__(
            coeff=coeff, source=adversary, routing=adversary_routing, comparison=comparison, **metric_arguments
        )
        if not 0 <= p <= 1:
            raise ValueError(f"MergedReconstructionLoss(p): a probability lies in [0, 1], got {p}.")
        if not adversary.adversarial or stochastic.adversarial:
            raise ValueError(
                "MergedReconstructionLoss merges an adversary such as PersistentPGD with a source that is none, such as"
                f" Uniform; got adversary={type(adversary).__name__}, stochastic={type(stochastic).__name__}."
            )
        if isinstance(adversary_routing, EachSite) or isinstance(stochastic_routing, EachSite):
            raise ValueError("MergedReconstructionLoss makes one forward; EachSite is a routing of many.")
        self.p, self.stochastic, self.stochastic_routing = p, stochastic, stochastic_routing

    def warm_up(self, observation: Observation) -> None:
        value = self.value_of(observation)
        self.source.warm_up(
            observation, term=self.term, value=lambda key, masks: ratio(value(key, masks, others_constant=True))
        )

    def measure(self, observation: Observation) -> Pair:
        value = self.value_of(observation)

        def attacked(sites: list[str]) -> Masks:
            def loss(masks: Masks) -> Tensor:
                return ratio(value(self.term, lambda _: masks, others_constant=True))

            return self.source(observation, term=self.term, sites=sites, loss=loss)

        return value(self.term, attacked, others_constant=False)

    def value_of(self, observation: Observation) -> Callable[..., Pair]:
        """(key of the adversary's routing, sites -> its masks, are the masks of the others constant) -> the term."""
        chance = observation.random_of(observation.samples).uniform(1, self.term, "adversarial")
        adversarial = (chance < self.p).reshape(-1, *(1,) * (len(observation.leading) - 1))
        others_route = only_route(self.stochastic_routing, observation, self.term)
        others = self.stochastic(observation, term=self.term, sites=others_route.sites, loss=no_loss)

        def value(key: str, masks_of: Callable[[list[str]], Masks], *, others_constant: bool) -> Pair:
            route = only_route(self.routing, observation, key)
            other = (others_route, others.detach() if others_constant else others)
            merged, masks = merge(adversarial, (route, masks_of(route.sites)), other)
            return compare_masked(observation, merged, masks, self.comparison)

        return value


def only_route(routing: Routing, observation: Observation, key: str) -> Route:
    routes = list(routing(observation, term=key))
    if len(routes) != 1 or routes[0].sites != observation.sites:
        raise ValueError(f"MergedReconstructionLoss takes a routing of all sites in one forward, got {routing}.")
    return routes[0]


def no_loss(masks: Masks) -> Tensor:
    raise TypeError("The stochastic source of a MergedReconstructionLoss asks for a loss, as only an adversary does.")


def merge(
    adversarial: Bool[Tensor, "batch *ones"], one: tuple[Route, Masks], other: tuple[Route, Masks]
) -> tuple[Route, Masks]:
    """The route and masks of one for adversarial samples, of the other for the rest.

    No routes stand for True everywhere, and no delta masks for 0: a delta that is absent (spec C5).
    """
    (route, masks), (other_route, other_masks) = one, other
    choose = adversarial.unsqueeze(-1)
    merged = {s: torch.where(choose, mask, other_masks.masks[s]) for s, mask in masks.masks.items()}
    routes = each(adversarial, route.routes, other_route.routes, absent=True)
    delta_masks = each(adversarial, masks.delta_masks, other_masks.delta_masks, absent=0.0)
    return Route(route.sites, routes), Masks(merged, delta_masks)


def each(
    adversarial: Bool[Tensor, "batch *ones"],
    one: dict[str, Tensor] | None,
    other: dict[str, Tensor] | None,
    *,
    absent: bool | float,
) -> dict[str, Tensor] | None:
    """Site by site one or the other; `absent` stands for what is not there, None where neither is."""
    if one is None and other is None:
        return None
    return {
        s: torch.where(adversarial, absent if one is None else one[s], absent if other is None else other[s])  # type: ignore[call-overload]
        for s in (one or other or {})
    }
