"""The report of a sweep: which jobs are solved, what was swept, curves of all jobs over one another."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from pdlightning.catalogue import jobs_planned
from pdlightning.config import flatten
from pdlightning.naming import in_short, short_keys
from pdlightning.report.curves import Chart, curve, short
from pdlightning.report.page import render
from pdlightning.report.read import Config, Job, RunFiles, read_jobs
from pdlightning.report.tables import Cell, Table, cells, digits_apart
from pdlightning.results import VERDICT
from pdlightning.runs import interval_words

POINTS_OF_ALL = 60_000
"""Of all curves together; each job and name has an equal part, of at most 300."""
ALWAYS = ("loss/total", "train/ci_l0", "eval/loss/total")
SEED = "seed"
DIGITS = 8
"""Of values in charts: jobs may differ by less than the steps of one curve."""
LISTED = 12
"""Values of a setting that are told one by one."""
SEARCH_RESULT = "optimization_results.yaml"
"""What Hydra's Optuna sweeper leaves at the end of a search."""

Settings = dict[str, dict[str, Cell]]
"""job -> what was swept -> its value there"""


def sweep_page(folder: Path, *, out: Path) -> str:
    jobs = read_jobs(folder)
    runs = [job.run for job in jobs if job.run is not None]
    if not runs:
        names, swept, settings = [], [], {}
    else:
        names, (swept, settings) = shown_names(runs), swept_settings(runs)
    judged = [run.summary["solved"] for run in runs if run.summary and run.summary["solved"] is not None]
    best = best_job(folder, jobs)
    labels = {job.name: label_of(job, settings, best=job is best) for job in jobs}
    charts = [chart for name in names if (chart := overlaid(name, jobs, labels, len(names), best=best))]
    finals = [chart for name in names if (chart := final_values(name, jobs, swept, settings))]
    return render(
        "sweep.html.jinja",
        payload={"charts": [*charts, *finals], "maps": [], "examples": None},
        title=f"{runs[0].config['name'] if runs else folder.name}, sweep",
        folder=folder,
        n_jobs=len(jobs),
        solved=interval_words(sum(judged), len(judged)) if judged else None,
        best=None if best is None else best_words(best, jobs),
        marked=None if best is None else jobs.index(best),
        verdict=sweep_verdict(jobs, judged),
        notes=[*waiting(folder, jobs), *(note for job in jobs if (note := note_of(job)))],
        swept=[(key, values_of(key, settings)) for key in swept],
        groups=group_table(runs, swept, settings),
        table_of_jobs=job_table(jobs, swept, settings, names, out=out),
        chart_list=charts,
        finals=finals,
    )


def swept_settings(runs: Sequence[RunFiles]) -> tuple[list[str], Settings]:
    """The settings in which the jobs differ, and of each job their values; labels are settings too.

    What was swept stands in the config of a job, in the order of the command; of other runs in one folder it is what
    differs. A setting that takes its value from another differs as that one does: of such the shortest name stays.
    """
    flat = {run.folder.name: said_of(run.config) for run in runs}
    keys = dict.fromkeys(key for config in flat.values() for key in config)
    columns = {key: tuple(str(config.get(key, "–")) for config in flat.values()) for key in keys}
    differing = [key for key, column in columns.items() if len(set(column)) > 1]
    recorded = list(dict.fromkeys(key for run in runs for key in run.config["logging"].get("swept") or {}))
    order = {key: i for i, key in enumerate(recorded)}
    swept: dict[tuple[str, ...], str] = {}
    for key in sorted(differing, key=lambda k: (order.get(k, len(order)), k.count("."), len(k))):
        swept.setdefault(columns[key], key)
    of_key = {key: setting_cells(config.get(key, "–") for config in flat.values()) for key in swept.values()}
    return list(of_key), {job: {key: column[i] for key, column in of_key.items()} for i, job in enumerate(flat)}


def setting_cells(values: Iterable[Any]) -> list[Cell]:
    """A setting in all jobs: continuous values in as many digits as tell them apart, others as on the command line."""
    values = list(values)
    digits = digits_apart(value for value in values if isinstance(value, float))
    return [Cell.of(v, digits) if isinstance(v, float) else Cell(in_short(v), sortable(v)) for v in values]


def sortable(value: Any) -> float | str:
    """A number where it is one, also as a word."""
    try:
        return in_short(value) if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return in_short(value)


def best_job(folder: Path, jobs: Sequence[Job]) -> Job | None:
    """The first job with the best objective, as the search itself found it; None where it has not come to its end."""
    try:
        best = yaml.safe_load((folder / SEARCH_RESULT).read_text())["best_value"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
    return next((job for job in jobs if (value := objective_of(job)) is not None and value == best), None)


def objective_of(job: Job) -> float | None:
    return job.run.metrics.get(job.run.config["objective"]) if job.run and job.run.summary else None


def best_words(best: Job, jobs: Sequence[Job]) -> str:
    name = best.run.config["objective"].removeprefix("eval/") if best.run else ""
    value = cells(objective_of(job) for job in jobs)[jobs.index(best)]
    return f"job {best.number}, {name} {value.text}"


def said_of(config: Config) -> dict[str, Any]:
    swept, labels = config["logging"].get("swept"), config.get("labels") or {}
    if swept:
        return {**swept, **labels}
    return {key: value for key, value in flatten(config).items() if not key.startswith("logging.")}


def values_of(key: str, settings: Settings) -> str:
    """One by one; of many numbers how many, from where to where."""
    values = list(dict.fromkeys(row[key] for row in settings.values()))
    if len(values) > LISTED and all(is_number(cell) for cell in values):
        low, high = (choose(values, key=lambda cell: cell.value).text for choose in (min, max))
        return f"{len(values)} values from {low} to {high}"
    return ", ".join(dict.fromkeys(cell.text for cell in values))


def is_number(cell: Cell) -> bool:
    return not isinstance(cell.value, str) and math.isfinite(cell.value)


def label_of(job: Job, settings: Settings, *, best: bool) -> str:
    values = settings.get(job.name, {})
    short = short_keys(values)
    said = ", ".join(f"{short[key]} {cell.text}" for key, cell in values.items())
    number = f"{job.number} (best)" if best else str(job.number)
    return f"{number}: {said}" if said else number


def shown_names(runs: Sequence[RunFiles]) -> list[str]:
    """What jobs are compared by: the objective, the goals, the total loss and the total L0."""
    l0 = {name for run in runs for name in run.metrics if name.startswith("eval/ci_l0") and name.endswith("/total")}
    wanted = [runs[0].config["objective"], *runs[0].config["goal"], *ALWAYS, *sorted(l0)]
    return [name for name in dict.fromkeys(wanted) if any(name in row for run in runs for row in run.rows)]


def overlaid(name: str, jobs: Sequence[Job], labels: dict[str, str], n_names: int, *, best: Job | None) -> Chart | None:
    """The curve of every job, in one chart; that of the best stands out."""
    points = max(20, min(300, POINTS_OF_ALL // (len(jobs) * n_names)))
    series = [
        {**curve(job.run.rows, name, label=labels[job.name], points=points, digits=DIGITS), "strong": job is best}
        for job in jobs
        if job.run is not None
    ]
    if not any(len(s["x"]) > 1 for s in series):
        return None
    return chart_like(f"jobs-{plain(name)}", name, "step", [s for s in series if s["x"]])


def final_values(name: str, jobs: Sequence[Job], swept: Sequence[str], settings: Settings) -> Chart | None:
    """The last value of every finished job, against the first swept setting that is no seed (else by job)."""
    ended = [job for job in jobs if job.run is not None and name in job.run.metrics]
    key = next((k for k in swept if k != SEED), None)
    if not ended:
        return None
    values = [Cell(str(job.number), sortable(job.number)) if key is None else settings[job.name][key] for job in ended]
    numbers, names = all(map(is_number, values)), list(dict.fromkeys(cell.text for cell in values))
    series = []
    for solved in (True, False, None):
        chosen = [
            (job, cell)
            for job, cell in zip(ended, values, strict=True)
            if job.run is not None and (job.run.summary or {"solved": None})["solved"] is solved
        ]
        if chosen:
            y = [short(job.run.metrics[name], DIGITS) for job, _ in chosen if job.run is not None]
            x = [cell.value if numbers else names.index(cell.text) for _, cell in chosen]
            index = [job.number for job, _ in chosen]
            series.append({"name": VERDICT[solved], "x": x, "y": y, "index": index, "strong": False, "verdict": solved})
    ticks = None if numbers else names
    chart = chart_like(f"final-{plain(name)}", name, key or "job", series)
    return {**chart, "points": True, "ticks": ticks}


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
    jobs: Sequence[Job], swept: Sequence[str], settings: Settings, names: Sequence[str], *, out: Path
) -> tuple[Table, list[str | None]]:
    """One row for each job, and the link to its own report where there is one."""
    names = [name for name in names if name.startswith("eval/")]
    heads = [("job", "number in the sweep"), *((short_keys(swept)[key], key) for key in swept)]
    heads += [("verdict", "by the goals"), ("seconds", "of the run"), *((n.removeprefix("eval/"), n) for n in names)]
    summaries = [(job.run.summary if job.run else None) or {} for job in jobs]
    columns = [
        [Cell(str(job.number), sortable(job.number)) for job in jobs],
        *([settings.get(job.name, {}).get(key, Cell.of(None)) for job in jobs] for key in swept),
        [Cell.of(word_of(job)) for job in jobs],
        cells(summary.get("seconds") for summary in summaries),
        *(cells(summary.get("metrics", {}).get(name) for summary in summaries) for name in names),
    ]
    return Table(heads, [list(row) for row in zip(*columns, strict=True)]), [link_to(job, out) for job in jobs]


def word_of(job: Job) -> str:
    if job.run is not None and job.run.summary is not None:
        return VERDICT[job.run.summary["solved"]]
    return "failed" if job.error else "not finished"


def link_to(job: Job, out: Path) -> str | None:
    page = job.folder / "report.html"
    relative = os.path.relpath(page.absolute(), out.absolute().parent)
    return Path(relative).as_posix() if page.is_file() else None


def group_table(runs: Sequence[RunFiles], swept: Sequence[str], settings: Settings) -> Table | None:
    """The share of solved seeds of each setting, where more than the seed was swept."""
    keys = [key for key in swept if key != SEED]
    if not keys or SEED not in swept:
        return None
    groups: dict[tuple[Cell, ...], list[bool]] = {}
    for run in runs:
        if run.summary and run.summary["solved"] is not None:
            values = tuple(settings[run.folder.name][key] for key in keys)
            groups.setdefault(values, []).append(run.summary["solved"])
    rows = [
        [
            *values,
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
