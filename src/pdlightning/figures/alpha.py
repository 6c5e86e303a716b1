"""Figure of alpha sweeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from pdlightning.figures.style import INK, categorical, name_panel, panels

LABELS = {
    "ce": ("cross-entropy of the next token", "nats per token"),
    "kl": ("KL to the output of the target", "nats per position"),
    "mse": ("squared error to the output of the target", "mean square"),
}


def plot_alpha_sweep(
    sources: Sequence[float],
    values: Mapping[str, Mapping[str, Sequence[float]]],
    target: Mapping[str, Mapping[str, float]],
) -> Figure:
    """Each measure against the source r, one panel per measure, one curve per run.

    Args:
        sources: the values of r, the same for all runs.
        values: run -> measure -> its value at each r. All runs have the same measures.
        target: run -> measure -> that of its target, a dashed line in its colour; nothing of a measure without one.

    Raises ValueError for no run, runs of other measures, and a value that is not finite.
    """
    measures = next((list(each) for each in values.values()), [])
    if not measures or any(list(each) != measures for each in values.values()):
        raise ValueError(f"expected runs of the same measures, got {[(run, list(v)) for run, v in values.items()]}.")
    for run, each in values.items():
        if bad := [m for m, curve in each.items() if not all(map(math.isfinite, curve))]:
            raise ValueError(f"{bad[0]} of {run} is not finite, and a figure would hide it: {list(each[bad[0]])}.")
    colours = dict(zip(values, categorical(len(values)), strict=True))
    figure, axes = panels(len(measures), title="Alpha sweep", width=4.6, height=3.2)
    for ax, measure in zip(axes, measures, strict=True):
        for run, each in values.items():
            ax.plot(sources, each[measure], color=colours[run], lw=1.2, marker="o", ms=3, label=run)
        own = {run: target[run][measure] for run in values if measure in target[run]}
        for run, value in own.items():
            ax.axhline(value, color=INK if len(set(own.values())) == 1 else colours[run], lw=1, ls="--")
        title, unit = LABELS[measure]
        name_panel(ax, f"{title}, dashed: the target" if own else title)
        ax.set(xlabel="source r:  mask = ci + (1 - ci) r", ylabel=unit)
        if measure != "ce":  # a distance, whose 0 is a perfect decomposition; entropies are read by their differences
            ax.set_ylim(bottom=0.0)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside lower left")
    return figure
