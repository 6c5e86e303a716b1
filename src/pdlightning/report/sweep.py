"""The report of a sweep: which jobs are solved, what was swept, curves of all jobs over one another."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdlightning.catalogue import jobs_planned
from pdlightning.config import flatten
from pdlightning.naming import short_keys
from pdlightning.report.curves import Chart, curve, short
from pdlightning.report.page import render
from pdlightning.report.read import Config, Job, RunFiles, read_jobs
from pdlightning.report.tables import Cell, Table
from pdlightning.results import VERDICT
from pdlightning.runs import interval_words

POINTS_OF_ALL = 60_000
"""Of all curves together; each job and name has an equal part, of at most 300."""
ALWAYS = ("loss/total", "train/ci_l0", "eval/loss/total")
SEED = "seed"


def sweep_page(folder: Path, *, out: Path) -> str:
    jobs = read_jobs(folder)
    runs = [job.run for job in jobs if job.run is not None]
    if not runs:
        names, swept, settings = [], [], {}
    else:
        names, (swept, settings) = shown_names(runs), swept_settings(runs)
    judged = [run.summary["solved"] for run in runs if run.summary and run.summary["solved"] is not None]
    labels = {job.name: label_of(job, settings) for job in jobs}
    charts = [chart for name in names if (chart := overlaid(name, jobs, labels, len(names)))]
    finals = [chart for name in names if (chart := final_values(name, jobs, swept, settings))]
    return render(
        "sweep.html.jinja",
        payload={"charts": [*charts, *finals], "maps": [], "examples": None},
        title=f"{runs[0].config['name'] if runs else folder.name}, sweep",
        folder=folder,
        n_jobs=len(jobs),
        solved=interval_words(sum(judged), len(judged)) if judged else None,
        verdict=sweep_verdict(jobs, judged),
        notes=[*waiting(folder, jobs), *(note for job in jobs if (note := note_of(job)))],
        swept=[(key, values_of(key, settings)) for key in swept],
        groups=group_table(runs, swept, settings),
        table_of_jobs=job_table(jobs, swept, settings, names, out=out),
        chart_list=charts,
        finals=finals,
    )


def swept_settings(runs: Sequence[RunFiles]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The settings in which the jobs differ, and of each job their values; labels are settings too.

    What was swept stands in the config of a job; of other runs in one folder it is what differs. A setting that takes
    its value from another differs as that one does: of such the shortest name stays.
    """
    flat = {run.folder.name: said_of(run.config) for run in runs}
    keys = dict.fromkeys(key for config in flat.values() for key in config)
    columns = {key: tuple(str(config.get(key, "–")) for config in flat.values()) for key in keys}
    differing = [key for key, column in columns.items() if len(set(column)) > 1]
    swept: dict[tuple[str, ...], str] = {}
    for key in sorted(differing, key=lambda k: (k.count("."), len(k))):
        swept.setdefault(columns[key], key)
    return list(swept.values()), {job: {k: str(c.get(k, "–")) for k in swept.values()} for job, c in flat.items()}


def said_of(config: Config) -> dict[str, Any]:
    swept, labels = config["logging"].get("swept"), config.get("labels") or {}
    if swept:
        return {**swept, **labels}
    return {key: value for key, value in flatten(config).items() if not key.startswith("logging.")}


def values_of(key: str, settings: dict[str, dict[str, str]]) -> str:
    return ", ".join(dict.fromkeys(values[key] for values in settings.values()))


def label_of(job: Job, settings: dict[str, dict[str, str]]) -> str:
    values = settings.get(job.name, {})
    short = short_keys(values)
    said = ", ".join(f"{short[key]} {value}" for key, value in values.items())
    return f"{job.number}: {said}" if said else str(job.number)


def shown_names(runs: Sequence[RunFiles]) -> list[str]:
    """What jobs are compared by: the objective, the goals, the total loss and the total L0."""
    l0 = {name for run in runs for name in run.metrics if name.startswith("eval/ci_l0") and name.endswith("/total")}
    wanted = [runs[0].config["objective"], *runs[0].config["goal"], *ALWAYS, *sorted(l0)]
    return [name for name in dict.fromkeys(wanted) if any(name in row for run in runs for row in run.rows)]


def overlaid(name: str, jobs: Sequence[Job], labels: dict[str, str], n_names: int) -> Chart | None:
    """The curve of every job, in one chart."""
    points = max(20, min(300, POINTS_OF_ALL // (len(jobs) * n_names)))
    series = [curve(job.run.rows, name, label=labels[job.name], points=points) for job in jobs if job.run is not None]
    if not any(len(s["x"]) > 1 for s in series):
        return None
    return chart_like(f"jobs-{plain(name)}", name, "step", [s for s in series if s["x"]])


def final_values(
    name: str, jobs: Sequence[Job], swept: Sequence[str], settings: dict[str, dict[str, str]]
) -> Chart | None:
    """The last value of every finished job, against the first swept setting that is no seed (else by job)."""
    ended = [job for job in jobs if job.run is not None and name in job.run.metrics]
    key = next((k for k in swept if k != SEED), None)
    if not ended:
        return None
    words = [str(job.number) if key is None else settings[job.name][key] for job in ended]
    names = list(dict.fromkeys(words))
    numbers = [as_number(word) for word in names]
    at = dict(zip(names, numbers if None not in numbers else range(len(names)), strict=True))
    series = []
    for solved in (True, False, None):
        chosen = [
            (job, w)
            for job, w in zip(ended, words, strict=True)
            if job.run is not None and (job.run.summary or {"solved": None})["solved"] is solved
        ]
        if chosen:
            y = [short(job.run.metrics[name]) for job, _ in chosen if job.run is not None]
            x, index = [at[w] for _, w in chosen], [job.number for job, _ in chosen]
            series.append({"name": VERDICT[solved], "x": x, "y": y, "index": index, "strong": False, "verdict": solved})
    ticks = None if None not in numbers else names
    chart = chart_like(f"final-{plain(name)}", name, key or "job", series)
    return {**chart, "points": True, "ticks": ticks}


def as_number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def chart_like(id: str, name: str, x: str, series: list[dict[str, Any]]) -> Chart:
    """Logarithmic where the values span more than a factor of thirty."""
    values = [y for s in series for y in s["y"]]
    log = min(values) > 0 and max(values) > 30 * min(values)
    title = name.removeprefix("eval/") if name.startswith("eval/") else f"{name.removeprefix('train/')}, training"
    return {
        "id": id, "title": title, "x": x, "y": "value", "scale": "log" if log else "linear",
        "series": series, "goals": [], "late": False,
    }  # fmt: skip


def plain(name: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "-", name)


def job_table(
    jobs: Sequence[Job], swept: Sequence[str], settings: dict[str, dict[str, str]], names: Sequence[str], *, out: Path
) -> tuple[Table, list[str | None]]:
    """One row for each job, and the link to its own report where there is one."""
    names = [name for name in names if name.startswith("eval/")]
    columns = [("job", "number in the sweep"), *((short_keys(swept)[key], key) for key in swept)]
    columns += [("verdict", "by the goals"), ("seconds", "of the run"), *((n.removeprefix("eval/"), n) for n in names)]
    rows, links = [], []
    for job in jobs:
        run = job.run
        values: list[Any] = [as_number(value) or value for value in settings.get(job.name, {}).values()]
        summary = run.summary if run else None
        word = VERDICT[summary["solved"]] if summary else ("failed" if job.error else "not finished")
        metrics = {} if run is None else run.metrics if summary else {}
        rows.append(
            [
                Cell.of(job.number),
                *(Cell.of(value) for value in (values or [None] * len(swept))),
                Cell.of(word),
                Cell.of(summary["seconds"] if summary else None),
                *(Cell.of(metrics.get(name)) for name in names),
            ]
        )
        page = job.folder / "report.html"
        relative = os.path.relpath(page.absolute(), out.absolute().parent)
        links.append(Path(relative).as_posix() if page.is_file() else None)
    return Table(columns, rows), links


def group_table(runs: Sequence[RunFiles], swept: Sequence[str], settings: dict[str, dict[str, str]]) -> Table | None:
    """The share of solved seeds of each setting, where more than the seed was swept."""
    keys = [key for key in swept if key != SEED]
    if not keys or SEED not in swept:
        return None
    groups: dict[tuple[str, ...], list[bool]] = {}
    for run in runs:
        if run.summary and run.summary["solved"] is not None:
            values = tuple(settings[run.folder.name][key] for key in keys)
            groups.setdefault(values, []).append(run.summary["solved"])
    rows = [
        [
            *(Cell.of(as_number(v) or v) for v in values),
            Cell(interval_words(sum(solved), len(solved)), sum(solved) / len(solved)),
        ]
        for values, solved in groups.items()
    ]
    columns = [*((short_keys(swept)[key], key) for key in keys), ("solved seeds", "share with 95 % Wilson interval")]
    return Table(columns, rows) if rows else None


def sweep_verdict(jobs: Sequence[Job], judged: Sequence[bool]) -> tuple[str, str]:
    ended = sum(job.run is not None and job.run.summary is not None for job in jobs)
    if ended < len(jobs):
        return f"{ended} of {len(jobs)} jobs finished", "wait"
    if judged:
        share = sum(judged) / len(judged)
        return f"{sum(judged)} of {len(judged)} solved", "good" if share == 1 else "bad" if share == 0 else "wait"
    return f"{ended} jobs finished", "plain"


def waiting(folder: Path, jobs: Sequence[Job]) -> list[str]:
    """Whether jobs of the sweep have not begun."""
    planned = jobs_planned(folder)
    return [f"{planned - len(jobs)} of {planned} jobs have not begun."] if planned and planned > len(jobs) else []


def note_of(job: Job) -> str | None:
    """What is to be said of a job that has no result."""
    if job.run is not None and job.run.summary is not None:
        return None
    if job.error:
        return f"Job {job.number} failed: {job.error}"
    reached = f" at step {job.run.last_step:,}" if job.run is not None and job.run.rows else ""
    return f"Job {job.number} has not come to its end{reached}."
