"""Curves of metrics.csv, grouped into charts that a reader wants to see together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pdlightning.report.read import Config, Row
from pdlightning.results import features_of

POINTS = 600
"""Of one curve at most; of a longer one every stretch keeps its least and its greatest value."""
DIGITS = 5

Chart = dict[str, Any]
TITLES = {
    "loss": "Training losses, unweighted",
    "eval/loss": "Losses on evaluation data",
    "l0": "Subcomponents that fire at a position (ci-L0)",
    "IdentityError": "Errors against the identity",
    "IdentityError/recovered": "Features recovered",
    "DenseError": "Errors against the dense truth",
    "DenseError/firing": "Subcomponents that fire in the single-feature probe",
    "WeightMatch": "Direction (MMCS) and length (ML2R) against the target's weights",
    "ReconstructionLoss": "Reconstruction error by masking",
    "PGDLadder": "Reconstruction error under attack, by ascents",
    "HiddenActsError": "Error of the site outputs under the ci masking",
    "ActiveSubcomponents": "Subcomponents with a mean ci above the threshold",
    "CEandKL/kl": "KL to the target's output, by masking",
    "CEandKL/ce": "Cross-entropy, by masking",
    "CEandKL/ce_difference": "CE lost against the target, by masking",
    "CEandKL/ce_unrecovered": "Share of CE unrecovered, by masking",
    "lr": "Learning rates",
}
UNITS = {
    "l0": "subcomponents",
    "IdentityError": "errors",
    "IdentityError/recovered": "features",
    "DenseError": "errors",
    "DenseError/firing": "subcomponents",
    "ActiveSubcomponents": "subcomponents",
    "CEandKL/kl": "nats",
    "CEandKL/ce": "nats",
    "CEandKL/ce_difference": "nats",
    "lr": "rate",
}
LOG = ("loss", "l0", "eval/loss", "ReconstructionLoss", "PGDLadder", "HiddenActsError", "CEandKL/kl", "lr")
FIRST = ("loss", "l0", "eval/loss", "ReconstructionLoss", "CEandKL/kl", "CEandKL/ce_difference", "IdentityError",
         "IdentityError/recovered", "DenseError", "DenseError/firing", "WeightMatch")  # fmt: skip
LAST = ("lr", "throughput")
COUNTS = ("IdentityError/recovered", "DenseError/firing")
"""What evaluations of errors log beside them, where more may be better: not to be read as errors."""
QUANTITIES = ("kl", "ce_difference", "ce_unrecovered", "ce")


def curve_charts(rows: Sequence[Row], config: Config) -> list[Chart]:
    """A chart for each group of names, those to look at first in front; a group without two points is left out."""
    classes = metric_classes(config)
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        groups.setdefault(group_of(name, classes), []).append(name)
    order = sorted(groups, key=lambda g: (FIRST.index(g) if g in FIRST else len(FIRST), g.split("/")[0] in LAST, g))
    charts = [chart_of(group, groups[group], rows, config) for group in order]
    return [chart for chart in charts if any(len(s["x"]) > 1 for s in chart["series"])]


def metric_classes(config: Config) -> dict[str, str]:
    """Name of an evaluation -> its class."""
    metrics = {**config["metric"]["fast"], **config["metric"]["slow"]}
    return {name: settings["_target_"].rpartition(".")[2] for name, settings in metrics.items()}


def group_of(name: str, classes: Mapping[str, str]) -> str:
    section, _, rest = name.partition("/")
    if section != "eval":
        return "l0" if name == "train/ci_l0" else name if section == "throughput" else section
    metric = rest.partition("/")[0]
    if metric == "loss":
        return "eval/loss"
    kind = classes.get(metric, metric)
    if kind == "CEandKL":
        part = rest.rpartition("/")[2].removesuffix("_target")
        return f"{kind}/{next((q for q in QUANTITIES if part.startswith(f'{q}_')), 'ce')}"
    if (count := f"{kind}/{rest.rpartition('/')[2]}") in COUNTS:
        return count
    return "l0" if kind == "CIL0" else kind


def chart_of(group: str, names: Sequence[str], rows: Sequence[Row], config: Config) -> Chart:
    if group == "l0" and any(name.endswith("/total") for name in names) and len(names) > 12:
        names = [name for name in names if name.count("/") < 2 or name.endswith("/total")]
    if group == "l0":  # what one looks for first
        names = sorted(names, key=lambda name: (name != "train/ci_l0", not name.endswith("/total")))
    goals: Mapping[str, Mapping[str, float]] = config["goal"]
    labels = labels_of(names, group, config)
    series = [curve(rows, name, label=labels[name]) for name in names]
    wanted = [{"name": labels[name], **goals[name]} for name in names if name in goals]
    return {
        "id": f"curve-{re.sub('[^A-Za-z0-9]+', '-', group)}",
        "title": TITLES.get(group, group.replace("throughput/", "").replace("_", " ")),
        "x": "step",
        "y": UNITS.get(group, "value" if group not in LOG else "loss"),
        "scale": "log" if group in LOG else "linear",
        "series": [s for s in series if s["x"]],
        "goals": wanted,
        "late": group.split("/")[0] in LAST,
    }


def labels_of(names: Sequence[str], group: str, config: Config) -> dict[str, str]:
    """Short names inside a chart: what the title says already is left out."""
    if group in COUNTS:
        return {name: count_label(name.split("/")[1], group, config) for name in names}
    if group in ("loss", "eval/loss", "lr") or group.startswith("throughput"):
        return {name: name.rpartition("/")[2] for name in names}
    labels = {name: "training, now" if name == "train/ci_l0" else name.removeprefix("eval/") for name in names}
    metrics = {label.partition("/")[0] for label in labels.values()}
    parted = all("/" in label for label in labels.values())
    if len(metrics) > 1 or not parted:
        return labels
    quantity = f"{group.partition('/')[2]}_"
    return {name: label.partition("/")[2].removeprefix(quantity) for name, label in labels.items()}


def count_label(metric: str, group: str, config: Config) -> str:
    """`identity_linear1 (of 5)`: of how many features, where it is features that are counted."""
    of = features_of(metric, config) if group == "IdentityError/recovered" else None
    return f"{metric} (of {of})" if of else metric


def curve(rows: Iterable[Row], name: str, *, label: str, points: int = POINTS, digits: int = DIGITS) -> dict[str, Any]:
    """The steps at which a name was measured and its values, thinned to about `points`."""
    found = [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
    x, y = np.array([step for step, _ in found]), np.array([value for _, value in found])
    if len(x) > points:
        kept = extremes(y, stretches=points // 2)
        x, y = x[kept], y[kept]
    return {"name": label, "x": [int(v) for v in x], "y": [short(v, digits) for v in y], "strong": label == "total"}


def extremes(values: np.ndarray, *, stretches: int) -> np.ndarray:
    """The places of the least and the greatest value of each stretch, with the first and the last place."""
    edges = np.linspace(0, len(values), stretches + 1).astype(int)
    kept = {0, len(values) - 1}
    for start, end in zip(edges, edges[1:], strict=False):
        kept |= {start + int(values[start:end].argmin()), start + int(values[start:end].argmax())}
    return np.array(sorted(kept))


def short(value: float, digits: int = DIGITS) -> float:
    """Five significant digits: what a hover shows, at half the size of the page."""
    return float(f"{value:.{digits}g}")
