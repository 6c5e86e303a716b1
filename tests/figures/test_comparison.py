from __future__ import annotations

import numpy as np
import pytest
import torch

from pdlightning.figures.comparison import plot_similarity_histograms, plot_similarity_maps

MATCHED = {"a": torch.tensor([1.0, 0.9, 0.2]), "b": torch.tensor([0.5, -0.35])}
BEST = {
    "a": (torch.tensor([1.0, 0.9, 0.4]), torch.tensor([1.0, 0.9, 0.2, 0.1])),
    "b": (torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.1])),
}


def test_histograms_count_every_cosine_once_on_one_scale() -> None:
    figure = plot_similarity_histograms(BEST, MATCHED)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["a", "b"]
    for ax, site in zip(figure.axes, MATCHED, strict=True):
        counts = [patch.get_data() for patch in ax.patches]
        assert [data.values.sum() for data in counts] == [len(MATCHED[site]), *(len(x) for x in BEST[site])]
        edges = counts[0].edges
        assert edges[0] == pytest.approx(-0.4) and edges[-1] == 1.0
    of_a = figure.axes[0].patches[0].get_data()
    assert of_a.values[-1] == 1 and of_a.values[np.searchsorted(of_a.edges, 0.2, side="right") - 1] == 1


def test_maps_show_the_cosines_under_the_numbers_of_subcomponents() -> None:
    pictures = {"a": torch.eye(3), "b": torch.tensor([[-0.5, 0.25]])}
    figure = plot_similarity_maps(pictures, {"a": (3, 3), "b": (10, 20)})
    for ax, picture in zip(figure.axes, pictures.values(), strict=False):
        assert np.array_equal(ax.images[0].get_array(), picture.numpy())
        assert ax.images[0].get_clim() == (-1.0, 1.0)
    assert figure.axes[1].images[0].get_extent() == [0.5, 20.5, 10.5, 0.5]


def test_what_is_not_finite_and_what_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="matched cosines of site 'a': 1 of 1 values are not finite"):
        plot_similarity_histograms({"a": BEST["a"]}, {"a": torch.tensor([torch.nan])})
    with pytest.raises(ValueError, match="sizes must have the sites"):
        plot_similarity_maps({"a": torch.eye(2)}, {})
