"""One look for every figure: colours, panels, and the check that what is drawn is finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

Scale = Literal["linear", "log"]

CI_COLOURS = "magma_r"  # perceptually uniform, pale at 0: an unimportant subcomponent leaves little ink
WEIGHT_COLOURS = "RdBu_r"  # white at 0, drawn with symmetric limits
INK = "#222222"
ACCENT = "#35618f"
QUIET = "#b5b5b5"


def columns_of(n: int) -> int:
    """How many of `n` panels stand in a row: at most four, the rows as full as can be."""
    return math.ceil(n / math.ceil(n / 4))


def panels(
    n: int, *, title: str, width: float = 3.0, height: float = 2.3, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A titled figure of `n` panels of `width` x `height` inches, at most four in a row unless `columns` is given."""
    columns = columns or columns_of(n)
    rows = math.ceil(n / columns)
    # The least width has room for the title.
    figure = Figure(figsize=(max(columns * width, 5.0), rows * height + 0.5), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(n)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=7, colors=INK)
        ax.xaxis.label.set_fontsize(8)
        ax.yaxis.label.set_fontsize(8)
    return figure, axes


def name_panel(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=8, color=INK)


def count_axis(ax: Axes, *which: Literal["x", "y"]) -> None:
    """Whole numbers at the ticks of an axis that counts things."""
    for name in which:
        {"x": ax.xaxis, "y": ax.yaxis}[name].set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def heat_map(ax: Axes, values: NDArray[Any], *, limits: tuple[float, float], colours: str) -> Any:
    """`values` `[rows, columns]` as an image with whole-number ticks; returns the image, for a colour bar."""
    ax.spines[["top", "right"]].set_visible(True)
    # Sharp cells while each has its pixels; beyond that, averaging keeps a single strong cell from being skipped.
    interpolation = "nearest" if max(values.shape) <= 300 else "antialiased"
    image = ax.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation=interpolation)
    count_axis(ax, "x", "y")
    return image


def colour_bar(figure: Figure, image: Any, ax: Axes | Sequence[Axes], *, label: str) -> Colorbar:
    bar = figure.colorbar(image, ax=ax, pad=0.02, aspect=30)
    bar.set_label(label, fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)
    return bar


def symmetric_limits(values: NDArray[Any]) -> tuple[float, float]:
    """(-a, a) with a the largest magnitude, so that 0 has the middle colour."""
    largest = float(np.abs(values).max()) or 1.0
    return -largest, largest


def categorical(n: int) -> list[tuple[float, ...]]:
    """`n` colours to tell curves apart: the ten of tab10, or evenly spaced ones where ten are not enough."""
    if n <= 10:
        return [tuple(colormaps["tab10"](i)) for i in range(n)]
    return [tuple(colormaps["viridis"](x)) for x in np.linspace(0.0, 0.92, n)]


def require_sites(per_site: Mapping[str, Any], **others: Mapping[str, Any]) -> None:
    """ValueError unless there is a site to draw and every other mapping has exactly the same sites."""
    if not per_site:
        raise ValueError("nothing to draw: expected a mapping with at least one site, got an empty one.")
    for name, other in others.items():
        if set(other) != set(per_site):
            raise ValueError(f"{name} must have the sites {sorted(per_site)}, got {sorted(other)}.")


def drawable(values: Tensor, *, what: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """`values` as a float32 array on the CPU; ValueError naming `what` if the shape is wrong or a value is not finite.

    `shape`: the expected size of each axis, None where any size of at least 1 will do.
    """
    matches = values.ndim == len(shape) and all(
        size == want if want is not None else size > 0 for size, want in zip(values.shape, shape, strict=True)
    )
    if not matches:
        expected = tuple("any" if want is None else want for want in shape)
        raise ValueError(f"{what}: expected a tensor of shape {expected}, got {tuple(values.shape)}.")
    array = values.detach().float().cpu().numpy()
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(f"{what}: {bad} of {array.size} values are not finite, and a figure would hide them.")
    return array
