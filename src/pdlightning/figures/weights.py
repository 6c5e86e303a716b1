"""Figure of the subcomponents' weights (spec E5)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from pdlightning.figures.style import (
    WEIGHT_COLOURS,
    colour_bar,
    columns_of,
    drawable,
    heat_map,
    name_panel,
    panels,
    require_sites,
    symmetric_limits,
)


def plot_component_weights(
    V: Mapping[str, Float[Tensor, "d_in C"]],
    U: Mapping[str, Float[Tensor, "C d_out"]],
    order: Mapping[str, Int[Tensor, " C"]],
) -> Figure:
    """V and, below it, U transposed: one column of both images is one subcomponent, in the given order.

    `order`: per site a permutation of its C subcomponents. Each image has symmetric limits of its own, because V and U
    may trade scale without changing their product. Raises ValueError naming the site where a value is not finite,
    shapes disagree or the order is no permutation.
    """
    require_sites(V, U=U, order=order)
    columns = columns_of(len(V))
    rows = math.ceil(len(V) / columns)
    figure, axes = panels(
        2 * rows * columns,
        title="Weights of the subcomponents: V (top) and U transposed (below)",
        columns=columns,
        width=3.2,
    )
    for i, site in enumerate(V):
        v = drawable(V[site], what=f"V of site {site!r}", shape=(None, None))
        u = drawable(U[site], what=f"U of site {site!r}", shape=(v.shape[1], None))
        permutation = order[site].tolist()
        if sorted(permutation) != list(range(v.shape[1])):
            raise ValueError(
                f"order of site {site!r}: expected a permutation of 0..{v.shape[1] - 1}, got {permutation}."
            )
        top = 2 * columns * (i // columns) + i % columns
        for ax, image, label in (
            (axes[top], v[:, permutation], "input"),
            (axes[top + columns], u.T[:, permutation], "output"),
        ):
            drawn = heat_map(ax, image, limits=symmetric_limits(image), colours=WEIGHT_COLOURS)
            colour_bar(figure, drawn, ax, label="weight")
            ax.set_ylabel(f"{label} dimension")
        name_panel(axes[top], f"V of {site}")
        name_panel(axes[top + columns], f"U of {site}")
        axes[top + columns].set_xlabel("subcomponent, in matched order")
    for i in range(len(V), rows * columns):
        top = 2 * columns * (i // columns) + i % columns
        axes[top].remove()
        axes[top + columns].remove()
    return figure
