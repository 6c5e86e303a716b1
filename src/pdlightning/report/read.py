"""What a run folder holds, read without building anything: a part that is missing or damaged becomes a note."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pdlightning.resume import CONFIG, ERROR, SUMMARY
from pdlightning.schema import complete
from pdlightning.storage import StorageError

Row = dict[str, float]
Config = dict[str, Any]
SETTINGS = ("name", "seed", "steps", "goal", "objective", "metric", "logging", "target", "pd")
SETTINGS_OF_PD = ("sites", "ci_fn", "losses")


@dataclass(frozen=True)
class RunFiles:
    """One run as its folder has it.

    Attributes:
        folder: where it is.
        config: resolved.
        summary: content of summary.json; None for a run that has not ended.
        rows: of metrics.csv, each with its "step"; what was not measured at a step is absent.
        environment: versions, machine, commit.
        data: kind -> the newest data of that kind that an evaluation wrote beside its figures.
        pictures, pages: the figures, and the pages among them, by name.
        notes: a sentence on everything that is missing or could not be read.
    """

    folder: Path
    config: Config
    summary: dict[str, Any] | None
    rows: list[Row]
    environment: dict[str, Any]
    data: dict[str, dict[str, Any]]
    pictures: list[Path]
    pages: list[Path]
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> Row:
        """The last value of every evaluation: of the summary, else of metrics.csv."""
        if self.summary is not None:
            return self.summary["metrics"]
        return {k: v for row in self.rows for k, v in row.items() if k.startswith("eval/")}

    @property
    def last_step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0


def is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_run(folder: Path, *, with_figures: bool = True) -> RunFiles:
    """Everything the report shows of a run; a `StorageError` where the folder is no run or its config is damaged."""
    if not is_run(folder):
        raise StorageError(f"{folder.absolute()} is not the folder of a run: it has no {CONFIG}.")
    try:
        config = yaml.safe_load((folder / CONFIG).read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise StorageError(f"{folder / CONFIG} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise StorageError(f"{folder / CONFIG} is damaged: expected a mapping, got {config!r:.80}.")
    config = complete(config)
    within = {key: config for key in SETTINGS} | {key: config.get("pd") or {} for key in SETTINGS_OF_PD}
    if lacking := [key for key, section in within.items() if key not in section]:
        raise StorageError(f"{folder / CONFIG} is not the config of a run: it has no {', '.join(lacking)}.")
    notes: list[str] = []
    summary = read_part(folder / SUMMARY, read_summary, notes)
    rows = read_part(folder / "metrics.csv", read_rows, notes) or []
    environment = read_part(folder / "environment.json", read_mapping, notes) or {}
    figures = sorted((folder / "figures").glob("*")) if with_figures else []
    data = [read_part(path, read_data, notes) for path in figures if path.suffix == ".json"]
    return RunFiles(
        folder=folder,
        config=config,
        summary=summary,
        rows=rows,
        environment=environment,
        data={d["kind"]: d for d in sorted(filter(None, data), key=lambda d: d["step"])},
        pictures=[path for path in figures if path.suffix == ".png"],
        pages=[path for path in figures if path.suffix == ".html"],
        notes=notes,
    )


def read_part(path: Path, read: Callable[[Path], Any], notes: list[str]) -> Any:
    """What `read` makes of a file; None where it is not there, and where it is damaged, which is noted."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except (ValueError, KeyError, OSError) as error:
        notes.append(f"{path.name} is damaged and was left out ({type(error).__name__}: {error}).")
        return None


def read_mapping(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"expected a mapping, got {content!r:.80}")
    return content


def read_data(path: Path) -> dict[str, Any]:
    content = read_mapping(path)
    if missing := [key for key in ("kind", "step") if key not in content]:
        raise ValueError(f"it says no {missing[0]}")
    return content


def read_summary(path: Path) -> dict[str, Any]:
    summary = read_mapping(path)
    for key in ("experiment", "steps", "seconds", "steps_per_second", "solved", "metrics"):
        summary[key]  # a KeyError here, not in the middle of a page
    return summary


def read_rows(path: Path) -> list[Row]:
    """Rows by step. Blanks are left out, and so is nan, which no curve can show."""
    with path.open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    rows = [{k: v for k, v in row.items() if not math.isnan(v)} for row in rows]
    return sorted(rows, key=lambda row: row["step"])


@dataclass(frozen=True)
class Job:
    """A job of a sweep: its run, or why there is none. `number` is that in the sweep, else the name of its folder."""

    name: str
    number: int | str
    folder: Path
    run: RunFiles | None
    error: str | None


def read_jobs(folder: Path) -> list[Job]:
    """The jobs of a sweep by their numbers; a `StorageError` where the folder holds no run at all."""
    below = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    jobs = [read_job(path) for path in below if is_run(path) or (path / ERROR).is_file()]
    if not jobs:
        raise StorageError(
            f"{folder.absolute()} is neither the folder of a run (it has no {CONFIG}) nor of a sweep (no folder in it "
            "is that of a run)."
        )
    return sorted(jobs, key=lambda job: (isinstance(job.number, str), job.number, job.name))


def read_job(folder: Path) -> Job:
    error = (folder / ERROR).read_text().strip() if (folder / ERROR).is_file() else ""
    lines = error.splitlines()
    sentence = (lines[-1] if lines[0].startswith("Traceback") else lines[0]) if lines else None
    begins = re.match(r"\d+(?=_|$)", folder.name)  # 7, or 7_seed=3
    run = None
    if is_run(folder):
        try:
            run = read_run(folder, with_figures=False)
        except StorageError as damaged:
            sentence = str(damaged)
    return Job(folder.name, int(begins[0]) if begins else folder.name, folder, run, sentence)
