"""Figure of the single-feature probe (spec E3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from pdlightning.figures.style import CI_COLOURS, colour_bar, drawable, heat_map, name_panel, panels, require_sites
from pdlightning.functional import dense_order, identity_matching

Order = Literal["identity", "dense", "none"]
AXIS_LABELS: dict[Order, str] = {
    "identity": "subcomponent, matched to features",
    "dense": "subcomponent, by mass",
    "none": "subcomponent",
}


def plot_single_feature_ci(ci: Mapping[str, Float[Tensor, "n_features C"]], order: Mapping[str, Order]) -> Figure:
    """Heat map of the ci that each single-feature input gives to each subcomponent, one panel per site.

    `order` says how a site's columns are arranged: `identity` matches them to the features (Hungarian), `dense` sorts
    them by mass, `none` leaves them. Colours are fixed to ci in [0, 1]. A truth that spans several sites is shown by
    giving their concatenated columns one entry.

    Raises ValueError naming the site where a value is not finite, an order is missing or an order is unknown.
    """
    require_sites(ci, order=order)
    figure, axes = panels(len(ci), title="Causal importance of single-feature inputs", height=2.6)
    image = None
    for ax, (site, values) in zip(axes, ci.items(), strict=True):
        array = drawable(values, what=f"single-feature ci of site {site!r}", shape=(None, None))
        columns = column_order(values, order[site], site).cpu().numpy()
        image = heat_map(ax, array[:, columns], limits=(0.0, 1.0), colours=CI_COLOURS)
        name_panel(ax, site)
        ax.set_xlabel(AXIS_LABELS[order[site]])
        ax.set_ylabel("input feature")
    colour_bar(figure, image, axes, label="causal importance (lower)")
    return figure


def column_order(ci: Float[Tensor, "n_features C"], order: Order, site: str) -> Int[Tensor, " C"]:
    """The columns of `ci` in the named order."""
    match order:
        case "identity":
            return identity_matching(ci)
        case "dense":
            return dense_order(ci)
        case "none":
            return torch.arange(ci.shape[1])
        case _:
            raise ValueError(f"order of site {site!r}: expected one of {list(AXIS_LABELS)}, got {order!r}.")
