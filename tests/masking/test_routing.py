"""Which sites are masked in which forward, and where (spec R2)."""

from __future__ import annotations

import naive
import pytest
import torch
from parity import ROUTINGS, SEED, STEP, batch_of, built, observed

from pdlightning.masking import AllSites, Bernoulli, EachSite, UniformSubset


@pytest.mark.parametrize("data", ["vectors", "tokens"])
@pytest.mark.parametrize("kind", ["uniform_subset", "bernoulli"])
def test_drawn_routes_equal_the_oracle(data: str, kind: str) -> None:
    model = built(data).float()
    batch = batch_of(data, (6, 3))
    observation = observed(model, batch.float() if data == "vectors" else batch, first=2)
    (route,) = ROUTINGS[kind](observation, term="term")
    expected = naive.draw_routes(
        naive.Draws(SEED, STEP, tuple(range(2, 8)), (3,)), list(model.components), "term", kind, p=0.6
    )
    assert route.sites == list(model.components)
    assert route.routes is not None
    for site in route.sites:
        assert torch.equal(route.routes[site], expected[site]), site


def test_all_sites_is_one_forward_and_each_site_one_forward_for_each() -> None:
    observation = observed(built("tokens").float(), batch_of("tokens", (2,)))
    (everything,) = AllSites()(observation, term="term")
    assert (everything.sites, everything.routes) == (observation.sites, None)
    each = [(route.sites, route.routes) for route in EachSite()(observation, term="term")]
    assert each == [([site], None) for site in observation.sites]


def test_every_position_has_a_routed_site_and_terms_draw_their_own() -> None:
    observation = observed(built().float(), batch_of("vectors", (256,)).float())
    routes = []
    for term in ("a", "b"):
        (route,) = UniformSubset()(observation, term=term)
        routes.append(torch.stack(list(route.routes.values())))  # type: ignore[union-attr]
        assert bool(routes[-1].any(0).all())
    assert not torch.equal(*routes)


@pytest.mark.parametrize(("p", "share"), [(0.0, 0.0), (1.0, 1.0), (0.25, 0.25)])
def test_bernoulli_routes_each_position_and_site_with_its_probability(p: float, share: float) -> None:
    observation = observed(built().float(), batch_of("vectors", (4096,)).float())
    (route,) = Bernoulli(p=p)(observation, term="term")
    for routed in route.routes.values():  # type: ignore[union-attr]
        assert abs(float(routed.float().mean()) - share) <= 4 * (p * (1 - p) / 4096) ** 0.5
