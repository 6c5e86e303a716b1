"""The runs below a folder, finished or not, as they stand on the disk. Reads without torch; damage is a state."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

from pdlightning.resume import CONFIG, ERROR, LOCK, SUMMARY, SWEEP

State = Literal["finished", "running", "broken", "unfinished"]
MULTIRUN = "multirun.yaml"
"""Hydra's own word for a sweep folder; sweeps from before `sweep.yaml` have it alone."""
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run on the disk.

    Attributes:
        folder: where it is.
        sweep: the folder of the sweep that it is a job of.
        state: broken is a job that failed, or a run whose files are damaged; unfinished has stopped somewhere.
        why: a broken run is broken, in a line.
        metrics: logged name -> value of the last evaluation.
        summary: the content of summary.json; empty where it has not ended.
    """

    folder: Path
    sweep: Path | None
    state: State
    why: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """As stored; empty where it is missing or damaged."""
        try:
            stored = yaml.load((self.folder / CONFIG).read_text(), Loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return {}
        return stored if isinstance(stored, dict) else {}

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Dotted key -> value of its config; a list is its JSON."""
        return dict(flat(self.config))

    def said(self, key: str) -> Any:
        """What the summary says, or else the config: a run that has not ended has no summary."""
        in_config = {"experiment": ("name",), "labels": ("labels",), "swept": ("logging", "swept"),
                     "name": ("logging", "run_name"), "steps": ("steps",)}  # fmt: skip
        if key in self.summary:
            return self.summary[key]
        value: Any = self.config
        for part in in_config.get(key, (key,)):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @cached_property
    def swept(self) -> Mapping[str, Any]:
        swept = self.said("swept")
        return swept if isinstance(swept, Mapping) else {}

    @cached_property
    def labels(self) -> Mapping[str, Any]:
        labels = self.said("labels")
        return labels if isinstance(labels, Mapping) else {}


def flat(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from flat(value, name)
        else:
            yield name, json.dumps(value) if isinstance(value, list) else value


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Every run in or below the folders, jobs in the order of their numbers."""
    found: dict[Path, Run] = {}
    for top in folders:
        for folder, sweep in run_folders(top):
            found.setdefault(folder.absolute(), read_run(folder, sweep))
    return sorted(found.values(), key=lambda run: by_number(run.folder))


def run_folders(top: Path) -> Iterator[tuple[Path, Path | None]]:
    """(run, the sweep it belongs to), not looking inside runs."""
    if (top / CONFIG).is_file():
        yield top, top.parent if is_sweep(top.parent) else None
        return
    for name, below, _ in os.walk(top):
        folder = Path(name)
        jobs = is_sweep(folder)
        below[:] = [each for each in below if not each.startswith(".")]
        for each in list(below):
            if (folder / each / CONFIG).is_file() or (jobs and each != "submitit"):
                yield folder / each, folder if jobs else None
                below.remove(each)


def is_sweep(folder: Path) -> bool:
    return (folder / SWEEP).is_file() or (folder / MULTIRUN).is_file()


def by_number(path: Path) -> list[tuple[int, str]]:
    """To sort paths by: 2_seed=2 comes before 10_seed=10."""

    def of(part: str) -> tuple[int, str]:
        number = re.match(r"\d+(?=_|$)", part)
        return (int(number[0]), part) if number else (-1, part)

    return [of(part) for part in path.parts]


def read_run(folder: Path, sweep: Path | None) -> Run:
    """The run in a folder; whatever is wrong with its files is said in `state` and `why`."""
    try:
        summary = json.loads((folder / SUMMARY).read_text())
        metrics = summary["metrics"]
        if not isinstance(metrics, dict) or "solved" not in summary:
            raise ValueError
        return Run(folder=folder, sweep=sweep, state="finished", summary=summary, metrics=metrics)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError):
        return Run(folder=folder, sweep=sweep, state="broken", why=f"{SUMMARY} is damaged")
    metrics = last_evaluation(folder)
    if is_running(folder):
        return Run(folder=folder, sweep=sweep, state="running", metrics=metrics)
    if (folder / ERROR).is_file():
        return Run(folder=folder, sweep=sweep, state="broken", why=reason(folder), metrics=metrics)
    run = Run(folder=folder, sweep=sweep, state="unfinished", metrics=metrics)
    damaged = (folder / CONFIG).is_file() and not run.config
    return Run(folder=folder, sweep=sweep, state="broken", why=f"{CONFIG} is damaged") if damaged else run


def is_running(folder: Path) -> bool:
    """Whether a process works on it. Its lock is only looked at: one that nobody holds stays as it is."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that may only be read
        return False


def reason(folder: Path) -> str:
    """The line of an error that says most: the last of a traceback, else the first."""
    text = (folder / ERROR).read_text(errors="replace") if (folder / ERROR).is_file() else ""
    lines = text.strip().splitlines() or ["no reason was given"]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def last_evaluation(folder: Path) -> dict[str, float]:
    """The last value of every evaluation in metrics.csv."""
    values: dict[str, float] = {}
    try:
        with (folder / "metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                values |= {name: float(value) for name, value in row.items() if name.startswith("eval/") and value}
    except (OSError, ValueError, AttributeError, csv.Error):  # none yet, or a damaged one
        return {}
    return values


def jobs_planned(sweep: Path) -> int | None:
    """How many jobs a sweep has; None of one that does not say."""
    try:
        return int(yaml.load((sweep / SWEEP).read_text(), Loader)["jobs"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
