"""`python -m pdlightning.statistics SWEEP...`: the table of a sweep for a paper, as Markdown. Reads without torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pdlightning.analysis.recovery import Recovered, training_compute_recovered
from pdlightning.catalogue import Run, find_runs
from pdlightning.config import ConfigError
from pdlightning.naming import pairs
from pdlightning.results import number
from pdlightning.runs import group_of, interval_words

HEADS = ("metric", "mean", "standard deviation", "min", "max", "runs")
CHANGES_NOTHING = ("runtime.", "logging.", "metric.", "goal.", "labels.", "cache_dir", "objective", "allow", "resume")
"""Settings that do not change what a run computes, nor what of it is measured under one name."""
CE_DIFFERENCE = "/ce_difference_"


def groups_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """What tells them apart but for the seed, in words -> the runs that differ by their seeds alone."""
    settings = [computing(run) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    varying = [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]
    found: dict[tuple[str, ...], list[Run]] = {}
    for run, each in zip(runs, settings, strict=True):
        found.setdefault(tuple(repr(each.get(key)) for key in varying), []).append(run)
    shown = [key for key in varying if not key.startswith(("pd.losses.", "pd.ci_fn."))]  # they repeat the top
    titles: dict[str, list[Run]] = {}
    for members in found.values():
        first, swept = members[0], ", ".join(group_of(members[0]))
        settled = {key: computing(first)[key] for key in shown if key in computing(first)}
        title = swept if swept and swept not in titles else ", ".join(pairs(settled))
        titles[", ".join(filter(None, [str(first.said("experiment")), title]))] = members
    return titles


def computing(run: Run) -> dict[str, Any]:
    """The settings that decide what it computes, but for seeds."""
    return {
        key: value
        for key, value in run.settings.items()
        if not key.startswith(CHANGES_NOTHING) and key.rsplit(".", 1)[-1] != "seed"
    }


def section(title: str, runs: Sequence[Run]) -> list[str]:
    """A heading, the share that is solved, and a row for each metric, those with a goal first."""
    goals = runs[0].config.get("goal") or {}
    names = [*goals, *(name for run in runs for name in run.metrics)]
    rows = {name: [run.metrics[name] for run in runs if name in run.metrics] for name in dict.fromkeys(names)}
    solved = [run.summary["solved"] for run in runs if run.summary["solved"] is not None]
    seeds = len({run.settings.get("seed") for run in runs})
    share = f" Solved: {interval_words(sum(solved), len(solved))}." if solved else ""
    said = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} of {seeds} {'seed' if seeds == 1 else 'seeds'}.{share}"
    table = [row(f"`{name.removeprefix('eval/')}`", values) for name, values in rows.items() if values]
    return ["", f"## {title}", "", said, "", line(HEADS), "|---|" + "---:|" * (len(HEADS) - 1), *table, *recovery(runs)]


def row(name: str, values: Sequence[float], *, bounds: Sequence[bool] = ()) -> str:
    """Mean, standard deviation (n - 1; none of one), min, max and n. `bounds`: which values are only upper bounds."""
    at_most, all_at_most = ("<= " if yes else "" for yes in (any(bounds), bool(bounds) and all(bounds)))
    spread = number(stdev(values)) if len(values) > 1 else "-"
    cells = [at_most + number(fmean(values)), spread, at_most + number(min(values)), all_at_most + number(max(values))]
    return line([name, *cells, str(len(values))])


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def recovery(runs: Sequence[Run]) -> list[str]:
    """A row for each masking whose cross-entropy was measured, or why there is none."""
    names = dict.fromkeys(name for run in runs for name in run.metrics if CE_DIFFERENCE in name)
    if not names:
        return ["", "Training compute recovered: none, as no cross-entropy was measured (metric CEandKL)."]
    curves = [run.summary["target"].get("validation_curve") for run in runs]
    if not all(curves):
        return [
            "",
            "Training compute recovered: none, as the record of the target has no validation curve: it was not trained "
            "here, or before its curve was recorded.",
        ]
    rows = []
    for name in names:
        found = [recovered(run, curve, name) for run, curve in zip(runs, curves, strict=True) if name in run.metrics]
        masking = name.partition(CE_DIFFERENCE)[2]
        shares, bounds = [each.share for each in found], [each.at_most for each in found]
        rows.append(row(f"training compute recovered, {masking}", shares, bounds=bounds))
    return rows


def recovered(run: Run, curve: Sequence[Sequence[float]], name: str) -> Recovered:
    try:
        return training_compute_recovered(curve, run.metrics[name])
    except ValueError as error:
        raise ConfigError(f"{run.folder}: {name}: {error}") from error


def document(folders: Sequence[Path]) -> str:
    """What the command prints."""
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise ConfigError(f"{', '.join(missing)}: there is no such folder.")
    runs = find_runs(folders)
    finished = [run for run in runs if run.state == "finished"]
    if not finished:
        where = ", ".join(map(str, folders))
        raise ConfigError(f"No run in or below {where} has finished; there are {len(runs)} others.")
    sections = [text for title, members in groups_of(finished).items() for text in section(title, members)]
    left = [f"{run.folder.name} ({run.state})" for run in runs if run.state != "finished"]
    out = ["", f"Left out, as they have not finished: {', '.join(left)}."] if left else []
    return "\n".join([*sections, *out]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pdlightning.statistics",
        description="Mean, standard deviation, min and max of every metric over the seeds of a sweep, the share that "
        "is solved, and of language models the training compute recovered; a Markdown table for each setting.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="SWEEP", help="the folder of a sweep, or of runs")
    try:
        print(document(parser.parse_args().folders))
    except ConfigError as error:
        sys.exit(str(error))
    except BrokenPipeError:  # `| head`
        sys.stderr.close()


if __name__ == "__main__":
    main()
