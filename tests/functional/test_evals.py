"""Errors against the known truth of a toy (spec E1, E3, E4)."""

from __future__ import annotations

import naive
import pytest
import torch
from torch import Tensor

from pdlightning import functional as pf


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shuffled(ci: Tensor, seed: int = 0) -> Tensor:
    return ci[:, torch.randperm(ci.shape[1], generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("C", [3, 5, 7])
@pytest.mark.parametrize("tolerance", [0.1, 0.2])
def test_identity_error_equals_the_search_over_all_matchings(C: int, tolerance: float) -> None:
    """Fewer columns than features, as many, and more."""
    for seed in range(5):
        ci = normal(5, C, seed=seed).sigmoid() ** 2
        ci = ci + torch.eye(5, C).double() * (0.6 if seed % 2 else 1)
        assert pf.identity_ci_error(ci, tolerance) == naive.identity_ci_error(ci, tolerance)


@pytest.mark.parametrize("C", [5, 8])
def test_a_perfect_identity_has_no_error_in_any_order_of_columns(C: int) -> None:
    ci = shuffled(torch.eye(5, C))
    assert pf.identity_ci_error(ci) == 0
    assert pf.recovered_features(ci) == 5
    matched, order = pf.permute_to_identity(ci)
    assert torch.equal(matched, torch.eye(5, C)) and sorted(order.tolist()) == list(range(C))


def test_each_flaw_of_an_identity_counts_once() -> None:
    stray, weak, missing = torch.eye(4), torch.eye(4), torch.eye(4, 3)
    stray[0, 2] = 0.15
    weak[1, 1] = 0.85
    for flawed in (stray, weak, missing):
        assert pf.identity_ci_error(shuffled(flawed)) == 1
        assert pf.recovered_features(flawed) == (2 if flawed is stray else 3)
    assert pf.identity_ci_error(stray, tolerance=0.2) == pf.identity_ci_error(weak, tolerance=0.2) == 0


@pytest.mark.parametrize("k", [0, 1, 2, 4])
def test_dense_error_equals_the_oracle(k: int) -> None:
    for seed in range(5):
        ci = normal(5, 4, seed=seed).mul(2).sigmoid()
        assert pf.dense_ci_error(ci, k) == naive.dense_ci_error(ci, k)


def test_a_dense_pattern_means_exactly_k_columns() -> None:
    ci = torch.zeros(6, 5)
    ci[:, [1, 3]] = 1.0
    assert pf.dense_ci_error(ci, 2) == 0
    assert pf.dense_ci_error(ci, 1) == 6, "every entry of a column too many"
    assert pf.dense_ci_error(ci, 3) == 1, "a column too few"
    with pytest.raises(ValueError, match="k must be between 0 and the number of columns 5, got 6"):
        pf.dense_ci_error(ci, 6)


def test_a_decomposition_with_one_subcomponent_for_each_column_matches_perfectly() -> None:
    weight = normal(3, 5)
    V, U = torch.eye(5).double(), weight.T.contiguous()
    assert pf.mean_max_cosine_similarity(weight, V, U).item() == pytest.approx(1, abs=1e-12)
    assert pf.mean_l2_ratio(weight, V, U).item() == pytest.approx(1, abs=1e-12)
    assert pf.mean_l2_ratio(weight, 0.9 * V, U).item() == pytest.approx(0.9), "shrinkage"
    assert pf.mean_max_cosine_similarity(weight, 0.9 * V, U).item() == pytest.approx(1)
    assert pf.mean_max_cosine_similarity(weight, -V, U).item() < 0.9, "a column pointing the other way is no match"


def test_weight_similarities_equal_the_oracle() -> None:
    weight, V, U = normal(3, 5), normal(5, 4, seed=1), normal(4, 3, seed=2)
    V[0] = 0
    assert pf.mean_max_cosine_similarity(weight, V, U).item() == pytest.approx(
        naive.mean_max_cosine_similarity(weight, V, U), abs=1e-12
    )
    V[0] = 0.1
    assert pf.mean_l2_ratio(weight, V, U).item() == pytest.approx(naive.mean_l2_ratio(weight, V, U), abs=1e-12)


def test_weight_similarities_ignore_order_and_common_sign_of_subcomponents() -> None:
    weight, V, U = normal(3, 5), normal(5, 4, seed=1), normal(4, 3, seed=2)
    order, sign = torch.tensor([2, 0, 3, 1]), torch.tensor([1.0, -1.0, -1.0, 1.0]).double()
    V2, U2 = (V * sign)[:, order], (U * sign[:, None])[order]
    torch.testing.assert_close(V2 @ U2, V @ U)
    for measure in (pf.mean_max_cosine_similarity, pf.mean_l2_ratio):
        torch.testing.assert_close(measure(weight, V2, U2), measure(weight, V, U), rtol=1e-12, atol=1e-12)


def test_l0_counts_strictly_above_the_threshold() -> None:
    assert pf.l0(torch.tensor([[0.0, 0.1, 0.2], [0.5, 0.5, 0.0]]), 0.1).tolist() == [1, 2]
