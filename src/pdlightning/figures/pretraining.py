"""Figure of a language model's pretraining."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from pdlightning.figures.curves import Row, draw_curve
from pdlightning.figures.style import ACCENT, INK, QUIET, count_axis, panels


def plot_pretraining(rows: Sequence[Row], *, unigram_entropy: float) -> Figure:
    """Training and validation loss against the step, in nats per token.

    Args:
        rows: each with "step", "train" and "validation".
        unigram_entropy: of the tokens, drawn as a dashed line: what knowing only their frequencies costs.
    """
    figure, (ax,) = panels(1, title="Pretraining", width=6.4, height=3.2)
    draw_curve(ax, rows, "train", colour=ACCENT, width=1.0)
    draw_curve(ax, rows, "validation", colour=INK, width=1.4)
    ax.axhline(unigram_entropy, color=QUIET, lw=1, ls="--", label="unigram entropy")
    ax.set(xlabel="step", ylabel="nats per token")
    count_axis(ax, "x")
    ax.legend(fontsize=7, frameon=False)
    return figure
