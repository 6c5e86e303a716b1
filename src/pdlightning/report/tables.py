"""Tables of a report: goals, sites, every metric, maskings of a language model, settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pdlightning.config import flatten
from pdlightning.report.curves import Chart, metric_classes, short
from pdlightning.report.read import Config, Row, RunFiles
from pdlightning.report.words import IN_USE
from pdlightning.results import goal_row, grouped, meets, number

SPECTRUM_POINTS = 512
"""Of one site at most."""


class Cell(NamedTuple):
    """What a table shows, the value it is sorted by, and what it says under the pointer."""

    text: str
    value: float | str
    full: str = ""

    @classmethod
    def of(cls, value: Any, digits: int = 4) -> Cell:
        if value is None:
            return cls("–", float("inf"))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return cls(str(value), str(value))
        text = f"{value:,}" if isinstance(value, int) else in_digits(value, digits)
        return cls(text, value, "" if isinstance(value, int) or float(text) == value else repr(value))


def cells(values: Iterable[Any]) -> list[Cell]:
    """A column, in as many digits as tell its values apart."""
    values = list(values)
    digits = digits_apart(value for value in values if isinstance(value, float))
    return [Cell.of(value, digits) for value in values]


def digits_apart(values: Iterable[float], *, least: int = 4, most: int = 8) -> int:
    """The fewest significant digits in which values look as different as they do in `most`."""
    different = set(values)
    looks = {digits: len({in_digits(value, digits) for value in different}) for digits in range(least, most + 1)}
    return next(digits for digits in looks if looks[digits] == looks[most])


def in_digits(value: float, digits: int) -> str:
    return f"{value:.{digits}g}"


class Table(NamedTuple):
    """Columns (name, explanation) and rows of cells."""

    columns: list[tuple[str, str]]
    rows: list[list[Cell]]


class Goal(NamedTuple):
    name: str
    value: str
    wanted: str
    met: bool


def goals(config: Config, metrics: Row) -> list[Goal]:
    rows = [goal_row(name, bounds, metrics) for name, bounds in config["goal"].items()]
    met = [name in metrics and meets(metrics[name], bounds) for name, bounds in config["goal"].items()]
    unbroken = "=\N{NO-BREAK SPACE}"  # a line may end between two bounds, not inside of one
    return [
        Goal(name, value, wanted.replace("= ", unbroken), ok)
        for (name, value, wanted, _), ok in zip(rows, met, strict=True)
    ]


def site_table(run: RunFiles) -> Table | None:
    """One row for each site: sizes, how many subcomponents fire, mean L0, faithfulness."""
    if "sites" not in run.data:
        return None
    data = run.data["sites"]
    threshold = f"{data['threshold']:g}"
    columns = [
        ("site", "module path in the target"),
        ("kind", "of module"),
        ("d_in", "inputs of the weight"),
        ("d_out", "outputs of the weight"),
        ("C", "number of subcomponents"),
        (f"fires (ci > {threshold})", f"subcomponents with ci > {threshold} at any of the positions looked at"),
        (f"mean ci > {IN_USE:g}", f"subcomponents whose mean ci is above {IN_USE:g}: a stray firing does not count"),
        (f"mean L0 (ci > {threshold})", f"mean number of subcomponents with ci > {threshold} at a position"),
        ("faithfulness", "mean squared entry of W - (VU)ᵀ"),
        ("relative", "‖W - (VU)ᵀ‖² / ‖W‖²"),
        ("parameters", "of V and U"),
    ]
    rows = []
    for path, site in data["sites"].items():
        fires, lasting = (int((np.array(site[k]) > t).sum()) for k, t in (("density", 0.0), ("mean_ci", IN_USE)))
        values = [
            path, site["kind"], site["d_in"], site["d_out"], site["C"], fires, lasting, float(site["l0"]),
            float(site["faithfulness"]), float(site["relative_faithfulness"]),
            site["C"] * (site["d_in"] + site["d_out"]),
        ]  # fmt: skip
        rows.append([Cell.of(value) for value in values])
    return Table(columns, rows)


def spectrum_charts(run: RunFiles) -> list[Chart]:
    """Mean ci, and firing density, of every subcomponent in falling order: one curve for each site."""
    if "sites" not in run.data:
        return []
    data = run.data["sites"]
    titles = {"mean_ci": "Mean ci", "density": f"Firing density: share of positions with ci > {data['threshold']:g}"}
    return [
        {
            "id": f"spectrum-{quantity}",
            "title": title,
            "x": "rank",
            "y": "mean ci" if quantity == "mean_ci" else "share",
            "scale": "log",
            "series": [sorted_curve(path, site[quantity]) for path, site in data["sites"].items()],
            "said": said_of_spectrum(quantity, data),
            "goals": [],
            "late": False,
        }
        for quantity, title in titles.items()
    ]


def said_of_spectrum(quantity: str, data: Mapping[str, Any], *, most: int = 12) -> str:
    """For who cannot see the curves: how many subcomponents of each site lie above the threshold."""
    above, words = (IN_USE, f"a mean ci above {IN_USE:g}") if quantity == "mean_ci" else (0.0, "any firing")
    counts = [(path, sum(value > above for value in site[quantity]), site["C"]) for path, site in data["sites"].items()]
    said = ", ".join(f"{path} {count} of {C}" for path, count, C in counts[:most])
    further = f", and {len(counts) - most} further sites" if len(counts) > most else ""
    return f"Subcomponents with {words}: {said}{further}."


def sorted_curve(name: str, values: list[float]) -> dict[str, Any]:
    """Values in falling order with the subcomponent each belongs to; of many, ranks evenly and evenly in the log."""
    order = np.argsort(-np.array(values), kind="stable")
    n, half = len(order), SPECTRUM_POINTS // 2
    ranks = np.arange(n)
    if n > SPECTRUM_POINTS:
        both = [np.linspace(0, n - 1, half), np.geomspace(1, n, half) - 1]
        ranks = np.unique(np.concatenate(both).round().astype(int))
    shown = order[ranks]
    return {
        "name": name,
        "x": (ranks + 1).tolist(),
        "y": [short(values[c]) for c in shown],
        "index": shown.tolist(),
        "strong": False,
    }


def metric_table(run: RunFiles) -> list[tuple[str, list[tuple[str, str, bool | None]]]]:
    """metric -> its parts, each with its value and whether it meets a goal (None: no goal)."""
    goal = run.config["goal"]
    judged = {
        name.removeprefix("eval/"): name in run.metrics and meets(run.metrics[name], bounds)
        for name, bounds in goal.items()
    }
    rows = []
    for metric, parts in grouped(run.metrics).items():
        cells = [(part, number(v), judged.get(f"{metric}/{part}" if part else metric)) for part, v in parts.items()]
        rows.append((metric, cells))
    return rows


QUANTITIES = {
    "kl": "KL to the target",
    "ce": "CE",
    "ce_difference": "CE − CE of the target",
    "ce_unrecovered": "CE unrecovered",
}


def masking_tables(run: RunFiles) -> list[tuple[str, str, Table]]:
    """(metric, CE of the target, table masking x quantity) of every CE and KL evaluation."""
    classes = metric_classes(run.config)
    found = []
    for metric, parts in grouped(run.metrics).items():
        if classes.get(metric) != "CEandKL":
            continue
        maskings = [name.removeprefix("kl_") for name in parts if name.startswith("kl_")]
        rows = [[Cell.of(m), *(Cell.of(parts.get(f"{q}_{m}")) for q in QUANTITIES)] for m in maskings]
        columns = [("masking", "what the masks are"), *((title, f"{q} in nats") for q, title in QUANTITIES.items())]
        found.append((metric, number(parts["ce_target"]), Table(columns, rows)))
    return found


def settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every setting by the name it has on the command line."""
    return [(name, "null" if value is None else str(value)) for name, value in flatten(config).items()]
