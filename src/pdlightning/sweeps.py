"""Sweeps over seeds: the share that is solved, with its confidence interval.

`python -m pdlightning.sweeps FOLDER` prints the table of a sweep again, also while it is going on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from pdlightning.commands import ERROR
from pdlightning.results import VERDICT, number
from pdlightning.resume import SUMMARY

SHOWN = ("tol_0.1", "mmcs", "ml2r", "loss/total")


class SolveRate(Callback):
    """After a multirun: one line for each job, and the share that met all goals of its experiment."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        print(solve_rate_table(folder))
        if any(not (job / SUMMARY).is_file() for job in jobs_of(folder)):
            sys.exit("Some jobs of this sweep failed.")


def jobs_of(folder: Path) -> list[Path]:
    """The folders of the jobs, in the order of their numbers."""
    jobs = [job for job in folder.iterdir() if job.is_dir() and not job.name.startswith(".")]
    return sorted(jobs, key=lambda job: (len(job.name), job.name))


def solve_rate_table(folder: Path) -> str:
    """The jobs of a sweep folder, and the share of the finished ones that is solved, with its 95 % Wilson interval."""
    lines, judged = [], []
    for job in jobs_of(folder):
        if not (job / SUMMARY).is_file():
            lines.append(f"{job.name:>4}  {reason(job)}")
            continue
        summary = json.loads((job / SUMMARY).read_text())
        lines.append(f"{job.name:>4}  {line_of(summary)}")
        judged += [] if summary["solved"] is None else [summary["solved"]]
    if judged:
        lines.append(f"solved: {interval_words(sum(judged), len(judged))}")
    return "\n".join(["", f"sweep {folder}", *lines])


def reason(job: Path) -> str:
    """Why a job has no summary: the line of its error, or that it never came to an end."""
    if not (job / ERROR).is_file():
        return "unfinished"
    lines = (job / ERROR).read_text().strip().splitlines()
    return f"failed: {lines[-1] if lines[0].startswith('Traceback') else lines[0]}"


def line_of(summary: dict[str, Any]) -> str:
    """Verdict, time, and the numbers to compare seeds by."""
    shown = {name.removeprefix("eval/"): value for name, value in summary["metrics"].items() if name.endswith(SHOWN)}
    numbers = ", ".join(f"{name} {number(value)}" for name, value in shown.items())
    return f"{VERDICT[summary['solved']]:<10}  {summary['seconds']:>7.1f} s  {numbers}"


def interval_words(solved: int, of: int) -> str:
    """`17 of 20 (85 %, 95 % interval 64 % to 95 %)`, by Wilson's score."""
    from scipy.stats import binomtest

    interval = binomtest(solved, of).proportion_ci(method="wilson")
    return f"{solved} of {of} ({solved / of:.0%}, 95 % interval {interval.low:.0%} to {interval.high:.0%})"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("python -m pdlightning.sweeps FOLDER: expected the folder of one sweep")
    print(solve_rate_table(Path(sys.argv[1])))
