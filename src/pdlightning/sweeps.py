"""Sweeps over seeds: the share that is solved, with its confidence interval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SolveRate(Callback):
    """After a multirun: one line for each job, and the share that met all goals of its experiment."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        print(solve_rate_table(Path(config.hydra.sweep.dir)))


def solve_rate_table(folder: Path) -> str:
    """The jobs of a sweep folder, and the solved share with its 95 % Wilson interval."""
    jobs = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: (len(p.name), p.name))
    summaries = [(job, json.loads(s.read_text())) for job in jobs if (s := job / "summary.json").is_file()]
    lines = [f"{job.name:>4}  {line_of(summary)}" for job, summary in summaries]
    lines += [f"{job.name:>4}  did not finish" for job in jobs if not (job / "summary.json").is_file()]
    judged = [summary["solved"] for _, summary in summaries if summary["solved"] is not None]
    if judged:
        lines.append(f"solved: {interval_words(sum(judged), len(judged))}")
    return "\n".join(["", f"sweep {folder}", *lines])


def line_of(summary: dict[str, Any]) -> str:
    verdict = {True: "solved", False: "NOT solved", None: "finished"}[summary["solved"]]
    errors = ", ".join(
        f"{name.removeprefix('eval/')} {value:g}"
        for name, value in summary["metrics"].items()
        if name.endswith(("tol_0.1", "mmcs", "ml2r", "loss/total"))
    )
    return f"{verdict:<10}  {summary['seconds']:>7.1f} s  {errors}"


def interval_words(solved: int, of: int) -> str:
    """`17 of 20 (85 %, 95 % interval 64-95 %)`, by Wilson's score."""
    from scipy.stats import binomtest

    interval = binomtest(solved, of).proportion_ci(method="wilson")
    return f"{solved} of {of} ({solved / of:.0%}, 95 % interval {interval.low:.0%} to {interval.high:.0%})"
