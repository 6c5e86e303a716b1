from __future__ import annotations

import numpy as np
import pytest
import torch

from pdlightning.figures import plot_single_feature_ci
from pdlightning.metrics.figures import column_orders, joined


def shuffled(columns: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return columns[:, torch.randperm(columns.shape[1], generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize(("n", "C"), [(1, 1), (5, 20), (100, 500)])
def test_identity_order_brings_the_matched_columns_to_the_diagonal(n: int, C: int) -> None:
    ci = shuffled(torch.eye(n, C) * torch.linspace(0.5, 1, C))
    figure = plot_single_feature_ci({"linear1": ci}, {"linear1": "identity"})
    image = figure.axes[0].images[0]
    drawn = np.asarray(image.get_array())
    assert drawn.shape == (n, C)
    assert (np.diagonal(drawn) >= 0.5).all()
    assert np.count_nonzero(drawn) == n
    assert image.get_clim() == (0.0, 1.0)


def test_dense_order_sorts_columns_by_mass_and_none_leaves_them() -> None:
    ci = torch.rand(6, 9, generator=torch.Generator().manual_seed(1))
    figure = plot_single_feature_ci({"a": ci, "b": ci}, {"a": "dense", "b": "none"})
    by_mass = np.asarray(figure.axes[0].images[0].get_array()).sum(0)
    assert (np.diff(by_mass) <= 0).all()
    np.testing.assert_array_equal(np.asarray(figure.axes[1].images[0].get_array()), ci)


def test_twelve_sites_have_a_panel_each_and_one_colour_bar() -> None:
    ci = {f"h.{i}.mlp.c_fc": torch.eye(3) for i in range(12)}
    figure = plot_single_feature_ci(ci, dict.fromkeys(ci, "identity"))
    assert [ax.get_title(loc="left") for ax in figure.axes] == [*ci, ""]
    figure.canvas.draw()


def test_bad_inputs_name_the_site() -> None:
    good = torch.eye(2)
    with pytest.raises(ValueError, match="site 'b': 4 of 4 values are not finite"):
        plot_single_feature_ci({"a": good, "b": good * torch.nan}, {"a": "none", "b": "identity"})
    with pytest.raises(ValueError, match=r"order must have the sites \['a', 'b'\], got \['a'\]"):
        plot_single_feature_ci({"a": good, "b": good}, {"a": "none"})
    with pytest.raises(ValueError, match=r"site 'a': expected one of .*'identity'.* got 'identitty'"):
        plot_single_feature_ci({"a": good}, {"a": "identitty"})
    with pytest.raises(ValueError, match=r"site 'a': expected a tensor of shape \('any', 'any'\), got \(4,\)"):
        plot_single_feature_ci({"a": torch.ones(4)}, {"a": "none"})


def test_sites_of_one_identity_pattern_are_one_truth() -> None:
    first, second = torch.zeros(3, 4), torch.zeros(3, 2)
    first[0, 2] = first[2, 1] = second[1, 1] = 1.0  # feature 1 lives in the second site
    ci = {"layers.0.mlp_in": first, "layers.0.mlp_out": torch.ones(3, 2), "layers.1.mlp_in": second}
    panels, order = joined(ci, {"layers.*.mlp_in": "identity", "layers.*.mlp_out": "dense"})
    assert order == {"layers.0.mlp_out": "dense", "layers.*.mlp_in together": "identity"}
    assert panels["layers.*.mlp_in together"].shape == (3, 6)
    orders = column_orders(ci, {"layers.*.mlp_in": "identity"})
    assert orders["layers.0.mlp_in"][:2].tolist() == [2, 1] and orders["layers.1.mlp_in"][0] == 1
    assert {site: sorted(x.tolist()) for site, x in orders.items()} == {
        s: list(range(x.shape[1])) for s, x in ci.items()
    }
