"""Subsets of sites are uniform in size and in members (spec R2)."""

from __future__ import annotations

from itertools import combinations

import naive
import pytest
import torch
from scipy import stats

from pdlightning.functional import KeyedRandom, subset_routes, uniform_subset_routes


def test_the_sites_of_lowest_score_are_routed() -> None:
    size, scores = torch.tensor([[0.0], [0.34], [0.99]]), torch.tensor([0.7, 0.1, 0.4]).expand(3, 3)
    assert subset_routes(size, scores).tolist() == [[False, True, False], [False, True, True], [True, True, True]]


def test_routes_equal_the_oracle_with_ties_to_the_earlier_site() -> None:
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(50, 2, 1, generator=generator)
    scores = (torch.rand(50, 2, 4, generator=generator) * 4).floor() / 4
    ours = subset_routes(size, scores)
    for i in range(50):
        for j in range(2):
            k = 1 + int(4 * size[i, j, 0])
            assert ours[i, j].tolist() == naive.subset_routes(k, scores[i, j].tolist())


@pytest.mark.parametrize("n", [1, 3, 5, 7, 48])
def test_the_largest_number_below_one_routes_all_sites_and_zero_routes_one(n: int) -> None:
    scores = torch.rand(2, n, generator=torch.Generator().manual_seed(0))
    assert subset_routes(torch.tensor([[1 - 2**-24], [0.0]]), scores).sum(-1).tolist() == [n, 1]


@pytest.mark.parametrize("keyed", [True, False])
def test_sizes_are_uniform_and_so_are_members_of_each_size(keyed: bool) -> None:
    n, rows = 4, 20_000
    if keyed:
        keys = KeyedRandom.at(
            seed=0, step=torch.tensor(3, dtype=torch.int32), samples=torch.arange(rows, dtype=torch.int32)
        )
        routes = subset_routes(keys.uniform(1, "term", "subset_size"), keys.uniform(n, "term", "subset"))
    else:
        routes = uniform_subset_routes(n, (rows,), generator=torch.Generator().manual_seed(0))
    sizes = routes.sum(-1)
    assert stats.chisquare(sizes.bincount(minlength=n + 1)[1:]).pvalue > 1e-3
    codes = (routes * 2 ** torch.arange(n)).sum(-1)
    for k in range(1, n):
        subsets = [sum(2**i for i in members) for members in combinations(range(n), k)]
        counts = [int((codes == code).sum()) for code in subsets]
        assert stats.chisquare(counts).pvalue > 1e-3, f"members of the subsets of size {k}"


def test_a_generator_makes_routes_repeatable_in_any_leading_shape() -> None:
    first, again = (uniform_subset_routes(3, (2, 5), generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (2, 5, 3) and first.dtype == torch.bool
    assert torch.equal(first, again)


def test_no_site_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one site, got n_sites=0"):
        uniform_subset_routes(0, (2,))
