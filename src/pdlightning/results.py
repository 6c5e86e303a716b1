"""The numbers that matter at the end of a run, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Goal = Mapping[str, Mapping[str, float]]

VERDICT = {True: "solved", False: "NOT solved", None: "finished"}


def meets(value: float, bounds: Mapping[str, float]) -> bool:
    return bounds.get("min", float("-inf")) <= value <= bounds.get("max", float("inf"))


def goals_met(goal: Goal, metrics: Mapping[str, float]) -> bool | None:
    """Whether every goal of the experiment is met; None where it has none. A goal never measured is not met."""
    if not goal:
        return None
    return all(name in metrics and meets(metrics[name], bounds) for name, bounds in goal.items())


def result_table(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The verdict; every goal with its value; then every evaluation, one line for each metric."""
    metrics: Mapping[str, float] = summary["metrics"]
    goal: Goal = config["goal"]
    lines = ["", f"{summary['experiment']}: {VERDICT[summary['solved']]}"]
    if goal:
        lines += ["", *aligned([goal_row(name, bounds, metrics) for name, bounds in goal.items()])]
    groups = grouped(metrics)
    losses = groups.pop("loss", {})
    measured = [("loss", losses), *groups.items()]
    lines += ["", *aligned([[name, said(values, features_of(name, config))] for name, values in measured if values])]
    return "\n".join([*lines, "", f"{summary['steps']} steps, {time_taken(summary)}"])


def time_taken(summary: Mapping[str, Any]) -> str:
    """The seconds are those of the whole run, with its target; the steps that of the decomposition alone."""
    rate = f"{number(summary['steps_per_second'])} steps/s of the decomposition, evaluations included"
    return f"{number(summary['seconds'])} s in all, {rate}"


def goal_row(name: str, bounds: Mapping[str, float], metrics: Mapping[str, float]) -> list[str]:
    wanted = " and ".join(f"{'>=' if k == 'min' else '<='} {number(v)}" for k, v in bounds.items())
    short = name.removeprefix("eval/")
    if name not in metrics:
        return [short, "not measured", wanted, "MISSED"]
    return [short, number(metrics[name]), wanted, "ok" if meets(metrics[name], bounds) else "MISSED"]


def grouped(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """metric -> {part: value}; a metric that is one number has the part ""."""
    groups: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        metric, _, part = name.removeprefix("eval/").partition("/")
        groups.setdefault(metric, {})[part] = value
    return groups


def said(values: Mapping[str, float], n_features: int | None) -> str:
    words = []
    for part, value in values.items():
        of = f" of {n_features}" if part == "recovered" and n_features else ""
        words.append(f"{part} {number(value)}{of}".lstrip())
    return "  ".join(words)


def features_of(metric: str, config: Mapping[str, Any]) -> int | None:
    """How many features a metric looks for, where it looks for any."""
    settings = {**config["metric"]["fast"], **config["metric"]["slow"]}
    return settings[metric].get("n_features") if metric in settings else None


def number(value: float) -> str:
    """Four digits that matter: a tiny number is never 0."""
    return f"{value:.4g}"


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns, two spaces in and two apart."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
