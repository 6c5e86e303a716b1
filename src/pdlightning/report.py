"""The numbers that matter at the end of a run, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Goal = Mapping[str, Mapping[str, float]]


def meets(value: float, bounds: Mapping[str, float]) -> bool:
    return bounds.get("min", float("-inf")) <= value <= bounds.get("max", float("inf"))


def goals_met(goal: Goal, metrics: Mapping[str, float]) -> bool | None:
    """Whether every goal of the experiment is met; None where it has none. A goal never measured is not met."""
    if not goal:
        return None
    return all(name in metrics and meets(metrics[name], bounds) for name, bounds in goal.items())


def result_table(summary: Mapping[str, Any], goal: Goal) -> str:
    """Name, value and goal of every evaluation, the ones with a goal first."""
    metrics = summary["metrics"]
    names = [*(n for n in goal if n in metrics), *(n for n in metrics if n not in goal)]
    rows = []
    for name in names:
        bounds = goal.get(name, {})
        wanted = " and ".join(f"{'>=' if k == 'min' else '<='} {v:g}" for k, v in bounds.items())
        mark = "" if not bounds else ("ok" if meets(metrics[name], bounds) else "MISSED")
        rows.append((name.removeprefix("eval/"), f"{metrics[name]:.4g}", wanted, mark))
    rows += [(f"{name.removeprefix('eval/')}", "not measured", "", "MISSED") for name in goal if name not in metrics]
    rows.append(("seconds", f"{summary['seconds']:.4g}", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    verdict = {True: "solved", False: "NOT solved", None: "no goal set"}[summary["solved"]]
    return "\n".join(["", f"{summary['experiment']}: {verdict}", *lines, ""])
