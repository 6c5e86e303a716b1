"""Figures of two decompositions side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from pdlightning.figures.style import (
    ACCENT,
    INK,
    QUIET,
    WEIGHT_COLOURS,
    colour_bar,
    columns_of,
    count_axis,
    drawable,
    heat_map,
    name_panel,
    panels,
    require_sites,
)

BINS = 40


def plot_similarity_histograms(
    best: Mapping[str, tuple[Float[Tensor, " n_a"], Float[Tensor, " n_b"]]],
    matched: Mapping[str, Float[Tensor, " pairs"]],
    *,
    names: tuple[str, str] = ("A", "B"),
) -> Figure:
    """How many subcomponents have which cosine: with their partner (filled), with the most similar of the other side.

    `best`: site -> the greatest cosine of each of a's subcomponents with one of b's, and of b's with a's. One panel per
    site, one horizontal scale. Raises ValueError naming the site where a value is not finite.
    """
    require_sites(best, matched=matched)
    a, b = names
    drawn = {
        site: [
            drawable(x, what=f"{what} of site {site!r}", shape=(None,))
            for x, what in (
                (matched[site], "matched cosines"),
                (best[site][0], "greatest cosines"),
                (best[site][1], "greatest cosines"),
            )
        ]
        for site in best
    }
    lowest = min(0.0, min(float(values.min()) for each in drawn.values() for values in each))
    edges = np.linspace(np.floor(10 * lowest) / 10, 1.0, BINS + 1)
    figure, axes = panels(len(drawn), title=f"Cosine similarity of the subcomponents of {a} and {b}")
    for ax, (site, (pairs, of_a, of_b)) in zip(axes, drawn.items(), strict=True):
        for values, words, style in (
            (pairs, "matched one to one", {"fill": True, "color": QUIET}),
            (of_a, f"most similar, {a} to {b}", {"color": ACCENT, "lw": 1.2}),
            (of_b, f"most similar, {b} to {a}", {"color": INK, "lw": 1.2, "ls": ":"}),
        ):
            ax.stairs(np.histogram(values, bins=edges)[0], edges, label=words, **style)
        count_axis(ax, "y")
        name_panel(ax, site)
        ax.set_xlabel("cosine")
        ax.set_ylabel("subcomponents")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside lower left", ncols=3)
    return figure


def plot_similarity_maps(
    pictures: Mapping[str, Float[Tensor, "rows columns"]],
    sizes: Mapping[str, tuple[int, int]],
    *,
    names: tuple[str, str] = ("A", "B"),
) -> Figure:
    """The cosine of every pair of subcomponents, partners on the diagonal by falling cosine, those without one behind.

    `pictures`: site -> cosines, of a large site the one farthest from 0 of each cell; `sizes`: site -> how many
    subcomponents its rows and columns stand for. Raises ValueError naming the site where a value is not finite.
    """
    require_sites(pictures, sizes=sizes)
    a, b = names
    figure, axes = panels(
        len(pictures), title=f"Cosine of every pair of subcomponents of {a} and {b}", width=3.0, height=2.8,
        columns=columns_of(len(pictures)),
    )  # fmt: skip
    image = None
    for ax, (site, picture) in zip(axes, pictures.items(), strict=True):
        values = drawable(picture, what=f"cosines of site {site!r}", shape=(None, None))
        image = heat_map(ax, values, limits=(-1.0, 1.0), colours=WEIGHT_COLOURS)
        rows, columns = sizes[site]
        image.set_extent((0.5, columns + 0.5, rows + 0.5, 0.5))
        name_panel(ax, site)
        ax.set_xlabel(f"subcomponent of {b}, in matched order")
        ax.set_ylabel(f"subcomponent of {a}, in matched order")
    colour_bar(figure, image, axes, label="cosine")
    return figure
