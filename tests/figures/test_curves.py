from __future__ import annotations

import csv
import io

import pytest

from pdlightning.figures import plot_training_curves

METRICS = """step,loss/total,loss/faithfulness,l0/total
0,1.5,1.0,
10,0.5,0.25,12.0
20,0.1,0.01,
30,0.05,0.005,3.0
"""
ROWS = list(csv.DictReader(io.StringIO(METRICS)))


def curves(ax) -> dict[str, list[tuple[float, float]]]:
    return {str(line.get_label()): list(zip(*line.get_data(), strict=True)) for line in ax.lines}


def test_curves_are_the_measured_values_at_their_steps() -> None:
    figure = plot_training_curves(ROWS, total="loss/total", losses=["loss/faithfulness"], l0=["l0/total"])
    losses, l0 = figure.axes
    assert curves(losses) == {
        "loss/total": [(0, 1.5), (10, 0.5), (20, 0.1), (30, 0.05)],
        "loss/faithfulness": [(0, 1.0), (10, 0.25), (20, 0.01), (30, 0.005)],
    }
    assert curves(l0) == {"l0/total": [(10, 12.0), (30, 3.0)]}
    assert losses.get_yscale() == l0.get_yscale() == "log"
    figure.canvas.draw()
    assert losses.get_xlim() == l0.get_xlim()


def test_without_l0_there_is_one_panel_and_a_single_measurement_is_a_visible_point() -> None:
    figure = plot_training_curves([{"step": 0, "loss": 2.0}], total="loss", losses=[], l0=[])
    assert len(figure.axes) == 1
    assert figure.axes[0].lines[0].get_marker() == "o"


def test_twelve_curves_have_twelve_colours() -> None:
    names = [f"loss/{i}" for i in range(12)]
    rows = [{"step": s, "total": 1.0, **dict.fromkeys(names, 1.0)} for s in range(3)]
    figure = plot_training_curves(rows, total="total", losses=names, l0=[])
    assert len({line.get_color() for line in figure.axes[0].lines}) == 13


def test_unknown_names_and_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no row has a value for 'loss/faith': .*'loss/faithfulness'"):
        plot_training_curves(ROWS, total="loss/total", losses=["loss/faith"], l0=[])
    with pytest.raises(ValueError, match="'loss' is nan at step 7"):
        plot_training_curves([{"step": 7, "loss": float("nan")}], total="loss", losses=[], l0=[])
