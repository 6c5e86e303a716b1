"""Routing: which sites run through their subcomponents, per position (spec R2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from pdlightning.functional.routing import subset_routes
from pdlightning.observation import Observation


@dataclass(eq=False)
class Route:
    """One forward: the sites that are masked, and where each of them is (None: at every position)."""

    sites: list[str]
    routes: dict[str, Bool[Tensor, " *leading"]] | None = None


class Routing:
    """Yields one Route for every forward that the term makes.

    `starts_late`: whether some of them leave the first sites alone, so that the clean run is worth keeping.
    """

    starts_late = False

    def __call__(self, observation: Observation, *, term: str) -> Iterator[Route]:
        raise NotImplementedError(f"{type(self).__name__} must yield routes in __call__(observation, term=...).")


class AllSites(Routing):
    """Every site, everywhere: `all`."""

    def __call__(self, observation: Observation, *, term: str) -> Iterator[Route]:
        yield Route(observation.sites)


class EachSite(Routing):
    """Layerwise: one forward per site, only that site routed; values and counts add up: `each_site`."""

    starts_late = True

    def __call__(self, observation: Observation, *, term: str) -> Iterator[Route]:
        for site in observation.sites:
            yield Route([site])


class UniformSubset(Routing):
    """Per position k ~ U{1..n_sites}, then a uniformly random k-subset of the sites: `uniform_subset`."""

    def __call__(self, observation: Observation, *, term: str) -> Iterator[Route]:
        sites = observation.sites
        routes = subset_routes(
            observation.random.uniform(1, term, "subset_size"), observation.random.uniform(len(sites), term, "subset")
        )
        yield Route(sites, dict(zip(sites, routes.unbind(-1), strict=True)))


class Bernoulli(Routing):
    """Per position and site, with probability p: `bernoulli(p)`."""

    def __init__(self, *, p: float):
        if not 0 <= p <= 1:
            raise ValueError(f"Bernoulli(p): a probability lies in [0, 1], got {p}.")
        self.p = p

    def __call__(self, observation: Observation, *, term: str) -> Iterator[Route]:
        sites = observation.sites
        routes = observation.random.uniform(len(sites), term, "bernoulli") < self.p
        yield Route(sites, dict(zip(sites, routes.unbind(-1), strict=True)))
