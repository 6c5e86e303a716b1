from __future__ import annotations

import pytest

from pdlightning.figures.alpha import plot_alpha_sweep

SOURCES = [0.0, 0.5, 1.0]
VALUES = {"one": {"ce": [5.0, 4.0, 3.5], "kl": [1.0, 0.5, 0.1]}, "two": {"ce": [4.5, 4.0, 3.6], "kl": [0.9, 0.4, 0.2]}}


def test_a_curve_for_each_run_and_a_dashed_line_for_each_target() -> None:
    figure = plot_alpha_sweep(SOURCES, VALUES, {"one": {"ce": 3.4}, "two": {"ce": 3.3}})
    for ax, measure in zip(figure.axes, ("ce", "kl"), strict=True):
        curves = {line.get_label(): list(line.get_ydata()) for line in ax.lines if line.get_label() in VALUES}
        assert curves == {run: each[measure] for run, each in VALUES.items()}
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    drawn = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert [line.get_ydata()[0] for line in dashed] == [3.4, 3.3]
    assert [line.get_color() for line in dashed] == [drawn["one"], drawn["two"]]
    assert figure.axes[1].get_ylim()[0] == 0.0


def test_runs_of_other_measures_and_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="expected runs of the same measures, got .*'mse'"):
        plot_alpha_sweep(SOURCES, {**VALUES, "three": {"mse": [1.0, 1.0, 1.0]}}, {})
    with pytest.raises(ValueError, match="ce of one is not finite"):
        plot_alpha_sweep([0.0], {"one": {"ce": [float("inf")]}}, {"one": {}})
