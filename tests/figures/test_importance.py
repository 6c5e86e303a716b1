from __future__ import annotations

import numpy as np
import pytest
import torch

from pdlightning.figures import plot_firing_density, plot_histograms, plot_mean_ci

SIZES = [1, 5, 500]


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("C", SIZES)
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_mean_ci_is_drawn_in_falling_order_for_every_site(C: int, scale: str) -> None:
    mean_ci = {f"h.{i}.mlp.c_fc": uniform(C, seed=i) for i in range(12)}
    figure = plot_mean_ci(mean_ci, scale)
    assert [ax.get_title(loc="left") for ax in figure.axes] == list(mean_ci)
    for ax, values in zip(figure.axes, mean_ci.values(), strict=True):
        line = ax.lines[0]
        np.testing.assert_array_equal(line.get_ydata(), values.sort(descending=True).values)
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, C + 1))
        assert ax.get_yscale() == scale
        assert ax.get_ylim() == figure.axes[0].get_ylim()


def test_log_mean_ci_says_how_many_subcomponents_are_at_zero() -> None:
    figure = plot_mean_ci({"linear1": torch.tensor([0.2, 0.0, 0.1, 0.0])}, "log")
    assert [text.get_text() for text in figure.axes[0].texts] == ["2 of 4 at 0"]


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_mean_ci_of_a_dead_site_can_be_drawn(scale: str) -> None:
    plot_mean_ci({"linear1": torch.zeros(7)}, scale).canvas.draw()


@pytest.mark.parametrize("C", SIZES)
def test_firing_density_counts_every_subcomponent_once(C: int) -> None:
    density = uniform(C) ** 8
    density[:: max(1, C // 3)] = 0.0
    figure = plot_firing_density({"linear1": density}, threshold=0.1)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights[-1] == int((density == 0).sum())
    assert sum(heights) == C


def test_firing_density_places_a_density_in_its_bin() -> None:
    figure = plot_firing_density({"linear1": torch.tensor([0.02, 1.0])}, threshold=0.0)
    filled = [b for b in figure.axes[0].patches if b.get_height() > 0]
    assert [b.get_height() for b in filled] == [1, 1]
    assert filled[0].get_x() <= np.log10(0.02) <= filled[0].get_x() + filled[0].get_width()
    assert filled[1].get_x() + filled[1].get_width() == pytest.approx(0.0)


def test_firing_density_outside_the_unit_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'linear2'.*\[0, 1\]"):
        plot_firing_density({"linear1": torch.ones(3), "linear2": torch.tensor([0.5, 1.5])}, threshold=0.1)


@pytest.mark.parametrize("bins", SIZES)
def test_histograms_show_the_counts_over_their_edges(bins: int) -> None:
    counts, edges = torch.arange(bins), torch.linspace(-3, 2, bins + 1)
    figure = plot_histograms({"linear1": (counts, edges)}, title="Logits", quantity="ci logit", scale="log")
    drawn = figure.axes[0].patches[0].get_data()
    np.testing.assert_array_equal(drawn.values, counts)
    np.testing.assert_allclose(drawn.edges, edges)
    assert figure.axes[0].get_xlabel() == "ci logit"
    assert figure.axes[0].get_yscale() == "log"


def test_histogram_with_one_edge_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match=r"edges of site 'linear1': expected a tensor of shape \(4,\), got \(3,\)"):
        plot_histograms({"linear1": (torch.ones(3), torch.ones(3))}, title="", quantity="", scale="linear")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_with_their_site(bad: float) -> None:
    broken = {"linear1": torch.ones(4), "linear2": torch.tensor([0.1, bad, 0.2])}
    with pytest.raises(ValueError, match=r"site 'linear2': 1 of 3 values"):
        plot_mean_ci(broken, "log")
    with pytest.raises(ValueError, match=r"site 'linear2': 1 of 3 values"):
        plot_firing_density(broken, threshold=0.1)
    with pytest.raises(ValueError, match=r"site 'linear2': 1 of 3 values"):
        histograms = {site: (counts, torch.arange(len(counts) + 1.0)) for site, counts in broken.items()}
        plot_histograms(histograms, title="", quantity="", scale="linear")


def test_no_site_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one site"):
        plot_mean_ci({}, "linear")
