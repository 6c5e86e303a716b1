from __future__ import annotations

import numpy as np
import pytest
import torch

from pdlightning.figures import plot_component_weights


def draws(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_sites", [1, 5, 12])
def test_images_are_v_and_u_transposed_in_the_given_order(n_sites: int) -> None:
    sites = [f"h.{i}" for i in range(n_sites)]
    V = {s: draws(4, 6, seed=i) for i, s in enumerate(sites)}
    U = {s: draws(6, 3, seed=100 + i) for i, s in enumerate(sites)}
    order = {s: torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(sites)}
    figure = plot_component_weights(V, U, order)
    images = {ax.get_title(loc="left"): ax.images[0] for ax in figure.axes if ax.images}
    assert len(images) == 2 * n_sites
    for s in sites:
        np.testing.assert_array_equal(np.asarray(images[f"V of {s}"].get_array()), V[s][:, order[s]])
        np.testing.assert_array_equal(np.asarray(images[f"U of {s}"].get_array()), U[s][order[s]].T)
        low, high = images[f"V of {s}"].get_clim()
        assert -low == high == pytest.approx(float(V[s].abs().max()))


@pytest.mark.parametrize("C", [1, 500])
def test_one_and_many_subcomponents_can_be_drawn(C: int) -> None:
    site = {"layers.0.mlp_in": torch.arange(C)}
    V, U = {"layers.0.mlp_in": draws(1000, C, seed=0)}, {"layers.0.mlp_in": torch.zeros(C, 1)}
    plot_component_weights(V, U, site).canvas.draw()


def test_bad_inputs_name_the_site() -> None:
    V, U, order = {"a": torch.ones(3, 2)}, {"a": torch.ones(2, 3)}, {"a": torch.arange(2)}
    with pytest.raises(ValueError, match="U of site 'a': 6 of 6 values are not finite"):
        plot_component_weights(V, {"a": U["a"] * torch.inf}, order)
    with pytest.raises(ValueError, match=r"U of site 'a': expected a tensor of shape \(2, 'any'\), got \(3, 2\)"):
        plot_component_weights(V, {"a": U["a"].T}, order)
    with pytest.raises(ValueError, match=r"order of site 'a': expected a permutation of 0..1, got \[0, 0\]"):
        plot_component_weights(V, U, {"a": torch.zeros(2, dtype=torch.int64)})
