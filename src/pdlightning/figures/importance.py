"""Figures of how much, and how often, subcomponents matter (spec E5)."""

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
    Scale,
    count_axis,
    drawable,
    name_panel,
    panels,
    require_sites,
)

BINS_PER_DECADE = 4


def plot_mean_ci(mean_ci: Mapping[str, Float[Tensor, " C"]], scale: Scale) -> Figure:
    """Mean ci of each subcomponent in falling order, one panel per site, one vertical scale for all.

    On the log scale subcomponents whose mean is exactly 0 cannot be placed; the panel says how many they are.
    Raises ValueError naming the site where a value is not finite.
    """
    require_sites(mean_ci)
    sites = {s: drawable(v, what=f"mean ci of site {s!r}", shape=(None,)) for s, v in mean_ci.items()}
    figure, axes = panels(len(sites), title=f"Mean causal importance of each subcomponent ({scale} scale)")
    positive = np.concatenate([v[v > 0] for v in sites.values()])
    largest, smallest = (float(positive.max()), float(positive.min())) if positive.size else (1.0, 1e-3)
    for ax, (site, values) in zip(axes, sites.items(), strict=True):
        zeros = int((values <= 0).sum())
        # Limits come before the data: matplotlib would warn of a site that has nothing to place on a log scale.
        if scale == "log":
            ax.set_yscale("log", nonpositive="mask")
            ax.set_ylim(10.0 ** np.floor(np.log10(smallest)), 1.6)
            note = f"{zeros} of {len(values)} at 0" if zeros else ""
            ax.text(0.98, 0.95, note, ha="right", va="top", fontsize=7, color=INK, transform=ax.transAxes)
        else:
            ax.set_ylim(-0.03 * largest, 1.05 * largest)
        size = float(np.clip(30 / np.sqrt(len(values)), 1.0, 6.0))
        ranks = np.arange(1, len(values) + 1)
        ax.plot(ranks, np.sort(values)[::-1], color=ACCENT, lw=0.8, marker="o", ms=size, mew=0)
        ax.set_xlim(0.5 - 0.02 * len(values), len(values) * 1.02 + 0.5)
        count_axis(ax, "x")
        name_panel(ax, site)
        ax.set_xlabel("subcomponent, by mean ci")
        ax.set_ylabel("mean ci")
    return figure


def plot_firing_density(density: Mapping[str, Float[Tensor, " C"]], threshold: float) -> Figure:
    """How many subcomponents fire how often: a histogram of log10 of the firing density, one panel per site.

    `density`: fraction of positions with ci > `threshold`, in [0, 1]. Subcomponents that never fire have a grey bar of
    their own at the left. Raises ValueError naming the site where a density is not finite or outside [0, 1].
    """
    require_sites(density)
    sites = {s: drawable(v, what=f"firing density of site {s!r}", shape=(None,)) for s, v in density.items()}
    for site, values in sites.items():
        if values.min() < 0 or values.max() > 1:
            raise ValueError(
                f"firing density of site {site!r}: expected fractions in [0, 1], got {values.min()} to {values.max()}."
            )
    lowest = min((np.log10(v[v > 0].min()) for v in sites.values() if (v > 0).any()), default=-1.0)
    decades = max(1, int(np.ceil(-lowest)))
    edges = np.linspace(-decades, 0, decades * BINS_PER_DECADE + 1)
    figure, axes = panels(len(sites), title=f"Firing density: fraction of positions with ci > {threshold:g}")
    for ax, (site, values) in zip(axes, sites.items(), strict=True):
        counts, _ = np.histogram(np.log10(values[values > 0]), bins=edges)
        ax.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=ACCENT, ec="white", lw=0.4)
        never = -1.25 * decades - 0.2
        ax.bar([never], [int((values == 0).sum())], width=0.07 * decades + 0.05, color=QUIET)
        step = max(1, -(-decades // 4))
        powers = list(range(0, -decades - 1, -step))
        ax.set_xticks([never, *powers], ["never", *(f"$10^{{{p}}}$" for p in powers)])
        count_axis(ax, "y")
        name_panel(ax, site)
        ax.set_xlabel("firing density")
        ax.set_ylabel("subcomponents")
    return figure


def plot_histograms(
    histograms: Mapping[str, tuple[Float[Tensor, " bins"], Float[Tensor, " edges"]]],
    *,
    title: str,
    quantity: str,
    scale: Scale,
) -> Figure:
    """Histograms of `quantity` (the words under the horizontal axis), one panel per site.

    `histograms`: site -> (counts `[bins]`, edges `[bins + 1]`); `scale` is that of the counts.
    Raises ValueError naming the site where a count or an edge is not finite, or the numbers of bins and edges disagree.
    """
    require_sites(histograms)
    figure, axes = panels(len(histograms), title=title)
    for ax, (site, (counts, edges)) in zip(axes, histograms.items(), strict=True):
        heights = drawable(counts, what=f"histogram counts of site {site!r}", shape=(None,))
        borders = drawable(edges, what=f"histogram edges of site {site!r}", shape=(len(heights) + 1,))
        if scale == "log":
            ax.set_yscale("log")
            ax.set_ylim(0.5, max(2.0 * float(heights.max()), 2.0))
        ax.stairs(heights, borders, fill=True, color=ACCENT)
        ax.set_xlim(float(borders[0]), float(borders[-1]))
        name_panel(ax, site)
        ax.set_xlabel(quantity)
        ax.set_ylabel("count")
    return figure
