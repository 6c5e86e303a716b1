"""Figure of how many subcomponents fire along a sequence."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from pdlightning.figures.style import ACCENT, count_axis, drawable, name_panel, panels, require_sites


def plot_l0_by_position(l0: Mapping[str, Float[Tensor, " sequence"]], threshold: float) -> Figure:
    """The mean number of subcomponents with ci > `threshold` at each position of a sequence: the total, then each site.

    Raises ValueError naming the site where a value is not finite, or the sites have different lengths.
    """
    require_sites(l0)
    length = len(next(iter(l0.values())))
    sites = {site: drawable(values, what=f"L0 of site {site!r}", shape=(length,)) for site, values in l0.items()}
    curves = {"total": np.sum(list(sites.values()), axis=0), **sites}
    figure, axes = panels(len(curves), title=f"Subcomponents with ci > {threshold:g} by position in the sequence")
    for ax, (name, values) in zip(axes, curves.items(), strict=True):
        marker = "o" if length == 1 else None
        ax.plot(np.arange(length), values, color=ACCENT, lw=1.0, marker=marker, ms=3)
        ax.set_ylim(0, 1.05 * float(values.max()) or 1.0)
        count_axis(ax, "x")
        name_panel(ax, name)
        ax.set_xlabel("position")
        ax.set_ylabel("L0")
    return figure
