"""Figure of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pdlightning.figures.style import INK, categorical, count_axis, name_panel, panels

Row = Mapping[str, float | str]


def plot_training_curves(rows: Sequence[Row], *, total: str, losses: Sequence[str], l0: Sequence[str]) -> Figure:
    """Losses (total in black) and ci-L0 against the step, both on log scales.

    `rows`: the lines of `metrics.csv`, each with a "step"; a name that is absent or blank in a line was not measured
    there. `total`, `losses`, `l0`: the names to draw. Raises ValueError for a name that no line has and for a value
    that is not finite, with its step.
    """
    n_panels = 2 if l0 else 1
    figure, axes = panels(n_panels, title="Training", width=6.4, height=3.2, columns=1)
    draw_curve(axes[0], rows, total, colour=INK, width=1.4)
    for name, colour in zip(losses, categorical(len(losses)), strict=True):
        draw_curve(axes[0], rows, name, colour=colour, width=1.0)
    for name, colour in zip(l0, categorical(len(l0)), strict=True):
        draw_curve(axes[1], rows, name, colour=colour, width=1.0)
    if l0:
        axes[1].sharex(axes[0])
    for ax, title, label in zip(
        axes, ("losses, unweighted, and their total", "ci-L0"), ("loss", "subcomponents per position"), strict=False
    ):
        name_panel(ax, title)
        ax.set(yscale="log", ylabel=label, xlabel="step")
        count_axis(ax, "x")
        ax.grid(axis="y", color="#e6e6e6", lw=0.5)
        ax.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_curve(ax: Axes, rows: Sequence[Row], name: str, *, colour: object, width: float) -> None:
    steps, values = measured(rows, name)
    # A curve of one measurement is a point, which a line alone would not show.
    ax.plot(steps, values, color=colour, lw=width, label=name, marker="o" if len(steps) == 1 else None, ms=3)


def measured(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """The steps at which `name` was measured, and its values."""
    found = [(int(row["step"]), float(row[name])) for row in rows if name in row and row[name] != ""]
    if not found:
        names = sorted({key for row in rows for key in row} - {"step"})
        raise ValueError(f"no row has a value for {name!r}: the names in these {len(rows)} rows are {names}.")
    for step, value in found:
        if not math.isfinite(value):
            raise ValueError(f"{name!r} is {value} at step {step}, and a figure would hide it.")
    return [step for step, _ in found], [value for _, value in found]
