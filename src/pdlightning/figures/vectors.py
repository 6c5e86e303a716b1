"""Figures of the geometry of a toy model of superposition beside its subcomponents (spec E4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pdlightning.figures.style import (
    CI_COLOURS,
    INK,
    QUIET,
    WEIGHT_COLOURS,
    categorical,
    colour_bar,
    drawable,
    heat_map,
    name_panel,
    panels,
)
from pdlightning.functional import identity_matching


def plot_tms_vectors(
    target_weight: Float[Tensor, "n_hidden n_features"],
    V: Float[Tensor, "n_features C"],
    U: Float[Tensor, "C n_hidden"],
    *,
    firing: Bool[Tensor, " C"],
) -> Figure:
    """The columns W_j of the target's weight beside the subcomponents' columns U_c V_{c,j}.

    With two hidden dimensions both are drawn as arrows: subcomponents that are `firing` in colours, the others grey.
    With more, heat maps over (feature j, subcomponent c) of cos(U_c V_{c,j}, W_j) and of the length
    ||U_c V_{c,j}|| / ||W_j||, without which a cosine of a vanishing vector would mislead.
    Raises ValueError naming the tensor that is not finite or has the wrong shape.
    """
    weight = drawable(target_weight, what="target_weight", shape=(None, None))
    n_hidden, n_features = weight.shape
    v = drawable(V, what="V", shape=(n_features, None))
    u = drawable(U, what="U", shape=(v.shape[1], n_hidden))
    fires = drawable(firing, what="firing", shape=(v.shape[1],)) > 0
    return draw_arrows(weight, v, u, fires) if n_hidden == 2 else draw_cosines(weight, v, u, fires)


def draw_arrows(weight: Any, v: Any, u: Any, fires: Any) -> Figure:
    figure, (left, right) = panels(2, title="Columns of the target and of its subcomponents", width=4.2, height=3.9)
    n_features, subcomponents = v.shape
    columns = np.einsum("jc,ch->cjh", v, u)
    reach = 1.2 * max(float(np.linalg.norm(weight, axis=0).max()), float(np.linalg.norm(columns, axis=-1).max()))
    arrows(left, weight.T, colour=INK, width=0.008)
    for j, (x, y) in enumerate(weight.T * 1.1):
        left.text(x, y, str(j), fontsize=7, color=INK, ha="center", va="center")
    for x, y in weight.T:
        right.plot([0, x], [0, y], color=INK, lw=0.7, ls=":", zorder=0)
    arrows(right, columns[~fires].reshape(-1, 2), colour=QUIET, width=0.004)
    chosen = np.flatnonzero(fires)
    for c, colour in zip(chosen, categorical(len(chosen)), strict=True):
        arrows(right, columns[c], colour=colour, width=0.01, label=f"subcomponent {c}" if len(chosen) <= 10 else None)
    if 0 < len(chosen) <= 10:
        figure.legend(fontsize=7, frameon=False, loc="outside lower center", ncols=5)
    name_panel(left, f"target: {n_features} features, numbered")
    name_panel(right, f"{len(chosen)} firing of {subcomponents} subcomponents (others grey, target dotted)")
    for ax in (left, right):
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="hidden 0", ylabel="hidden 1")
    return figure


def arrows(ax: Axes, tips: Any, *, colour: Any, width: float, label: str | None = None) -> None:
    """Arrows from the origin to `tips` `[n, 2]`, in data coordinates."""
    zero = np.zeros(len(tips))
    ax.quiver(
        zero, zero, tips[:, 0], tips[:, 1], color=[colour], width=width, label=label,
        angles="xy", scale_units="xy", scale=1, minlength=0,
    )  # fmt: skip


def draw_cosines(weight: Any, v: Any, u: Any, fires: Any) -> Figure:
    lengths = np.linalg.norm(weight, axis=0)
    outputs = np.linalg.norm(u, axis=1)
    # An all-zero column has no direction: its cosine is drawn as 0.
    directions = (weight / np.where(lengths > 0, lengths, 1)).T @ (u / np.where(outputs > 0, outputs, 1)[:, None]).T
    cosine = directions * np.sign(v)
    ratio = np.abs(v) * outputs / np.where(lengths > 0, lengths, 1)[:, None]
    order = identity_matching(torch.from_numpy(cosine * ratio)).numpy()
    order = np.concatenate([order[fires[order]], order[~fires[order]]])
    figure, (left, right) = panels(2, title="Subcomponent columns against the target's columns", width=4.6, height=3.6)
    drawn = heat_map(left, cosine[:, order], limits=(-1.0, 1.0), colours=WEIGHT_COLOURS)
    colour_bar(figure, drawn, left, label="cosine similarity")
    drawn = heat_map(right, ratio[:, order], limits=(0.0, max(1.0, float(ratio.max()))), colours=CI_COLOURS)
    colour_bar(figure, drawn, right, label="length / target's length")
    name_panel(left, "direction")
    name_panel(right, "length")
    for ax in (left, right):
        if 0 < fires.sum() < len(fires):
            ax.axvline(fires.sum() - 0.5, color=INK, lw=0.7, ls=":")
        ax.set(xlabel=f"subcomponent, matched ({fires.sum()} firing first)", ylabel="feature")
    return figure
