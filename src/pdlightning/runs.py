"""`python -m pdlightning.runs FOLDER...`: runs and sweeps as a table: filtered, sorted, compared."""

from __future__ import annotations

import argparse
import csv
import io
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdlightning.catalogue import Run, by_number, find_runs, jobs_planned
from pdlightning.config import ConfigError
from pdlightning.naming import in_short, pairs, short_keys
from pdlightning.query import Query, condition
from pdlightning.results import number

SHOWN = ("loss/total", "tol_0.1", "mmcs", "ml2r")
"""Metrics of which these are the ends come first."""
VERDICT = {True: "solved", False: "no", None: ""}


def table(runs: Sequence[Run], columns: Sequence[str] | None = None, *, width: int | None = None) -> list[str]:
    """A line for each run under a line of names, then why the broken ones are; no wider than `width` letters.

    Without `columns`: what was swept, labels, verdict, time, and those of the usual metrics that fit.
    """
    query = Query(runs)
    top = common_folder(runs)
    fixed = {"run": [shown_path(run, top) for run in runs], "state": [run.state for run in runs]}
    if columns is None:
        optional = {name: [cell(query.value(run, key)) for run in runs] for name, key in usual(runs).items()}
    else:
        optional = {name: [cell(query.value(run, query.resolve(name))) for run in runs] for name in columns}
    shown, hidden = fitting({**fixed, **optional}, width)
    lines = rows([[name, *values] for name, values in shown.items()])
    if hidden:
        lines.append(f"  not in this width: {', '.join(hidden)} (--columns or --csv)")
    broken = [f"  {shown_path(run, top)}: {run.why}" for run in runs if run.state == "broken"]
    return [*lines, *(["broken:", *broken] if broken else [])]


def usual(runs: Sequence[Run]) -> dict[str, str]:
    """Title -> key of the columns that tell these runs apart."""
    swept = short_keys(dict.fromkeys(key for run in runs for key in run.swept))
    labels = dict.fromkeys(name for run in runs for name in run.labels)
    several = {"experiment": "experiment"} if len({run.said("experiment") for run in runs} - {None}) > 1 else {}
    metrics = dict.fromkeys(name for run in runs for name in run.metrics)
    objectives = {run.settings.get("objective") for run in runs}
    chosen = [name for name in metrics if name in objectives]
    chosen += [name for end in SHOWN for name in metrics if name.endswith(end) and name not in chosen]
    return {
        **several,
        **{short: key for key, short in swept.items()},
        **{name: f"labels.{name}" for name in labels},
        **({"solved": "solved"} if any(run.summary.get("solved") is not None for run in runs) else {}),
        "seconds": "seconds",
        **{name.removeprefix("eval/"): name for name in chosen},
    }


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return VERDICT[value]
    return "" if value is None else number(value) if isinstance(value, int | float) else in_short(value)


def rows(columns: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def fitting(columns: Mapping[str, Sequence[str]], width: int | None) -> tuple[dict[str, list[str]], list[str]]:
    """The columns that fit, and the names of those that do not. The first, a path, keeps its end where it must."""
    shown: dict[str, list[str]] = {}
    hidden: list[str] = []
    used = 0
    for name, values in columns.items():
        wide = max(len(name), *map(len, values)) + 2
        if width is not None and not shown and wide > width // 2:
            values = [value if len(value) <= width // 2 else f"…{value[-width // 2 :]}" for value in values]
            wide = width // 2 + 3
        if width is None or used + wide <= width or len(shown) < 2:
            shown[name] = list(values)
            used += wide
        else:
            hidden.append(name)
    return shown, hidden


def common_folder(runs: Sequence[Run]) -> Path:
    return Path(os.path.commonpath([run.folder.parent.absolute() for run in runs])) if runs else Path()


def shown_path(run: Run, top: Path) -> str:
    return str(run.folder.absolute().relative_to(top))


def share_lines(runs: Sequence[Run]) -> list[str]:
    """Of every sweep how many jobs are missing, and the share of these runs that is solved, for each setting."""
    lines = []
    sweeps = list(dict.fromkeys(run.sweep for run in runs if run.sweep is not None))
    for sweep in sweeps:
        everyone = find_runs([sweep])  # these runs may be a choice of them
        n_finished = sum(run.state == "finished" for run in everyone)
        finished = [run for run in runs if run.sweep == sweep and run.state == "finished"]
        name = f"{sweep}: " if any(run.sweep != sweep for run in runs) else ""
        planned = jobs_planned(sweep) or len(everyone)
        if n_finished < planned:
            lines.append(f"{name}{n_finished} of {planned} jobs have finished")
        groups: dict[tuple[str, ...], list[bool]] = {}
        for run in finished:
            if run.summary["solved"] is not None:
                groups.setdefault(group_of(run), []).append(run.summary["solved"])
        if len(groups) > 1 and all(len(solved) == 1 for solved in groups.values()):
            continue  # a search: no two jobs are of one kind
        for group, solved in groups.items():
            words = f"{','.join(group)}: " if group else ""
            of = "of these " if len(finished) < n_finished else ""
            lines.append(f"{name}{words}{of}solved: {interval_words(sum(solved), len(solved))}")
    return lines


def group_of(run: Run) -> tuple[str, ...]:
    """What tells a job from others of its sweep, but for the seed."""
    short = short_keys(run.swept)
    return tuple(
        pair for key, pair in zip(run.swept, pairs(run.swept), strict=True) if short[key].split(".")[-1] != "seed"
    )


def interval_words(solved: int, of: int) -> str:
    """`17 of 20 (85%, 95 % interval 64% to 95%)`, by Wilson's score."""
    low, high = wilson_interval(solved, of)
    return f"{solved} of {of} ({solved / of:.0%}, 95 % interval {low:.0%} to {high:.0%})"


def wilson_interval(solved: int, of: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) of p = solved/n: 95 % for this z."""
    p, scale = solved / of, 1 + z**2 / of
    middle, half = p + z**2 / (2 * of), z * (p * (1 - p) / of + (z / (2 * of)) ** 2) ** 0.5
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def write_csv(runs: Sequence[Run], path: Path, columns: Sequence[str] = ()) -> None:
    """All that is known of each run: a column for every swept setting, label and metric, and for `columns`."""
    from pdlightning.storage import atomic_write_text

    query = Query(runs)
    swept = dict.fromkeys(key for run in runs for key in run.swept)
    labels = dict.fromkeys(f"labels.{name}" for run in runs for name in run.labels)
    metrics = dict.fromkeys(name for run in runs for name in run.metrics)
    fields = ("experiment", "name", "state", "why", "solved", "steps", "seconds")
    keys = dict.fromkeys([*fields, *swept, *labels, *metrics])
    further = [query.resolve(name) for name in columns]  # a setting or metric has its kind before its name
    keys |= dict.fromkeys(key for key in further if not {key, key.partition(".")[2]} & keys.keys())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["folder", *keys])
    for run in runs:
        writer.writerow(
            [from_there(run.folder, path), *("" if (v := query.value(run, key)) is None else v for key in keys)]
        )
    atomic_write_text(path, text.getvalue())


def from_there(folder: Path, file: Path) -> str:
    """The path of a run as seen from the folder of a file, so that both can be moved together."""
    return os.path.relpath(folder, file.parent)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pdlightning.runs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The runs and sweeps below some folders, as a table.",
        epilog="""A KEY is a setting (pd.seed, or its end: seed), a label (size), a metric (eval/loss/total, or its end:
loss/total), or one of: experiment, name, state, solved, steps, seconds, folder. In doubt: labels.KEY, metrics.KEY,
config.KEY.

  python -m pdlightning.runs outputs/tms_5-2 --filter 'loss/total<1.5e-3' --filter solved=true --sort loss/total
  python -m pdlightning.runs SWEEP --columns seed,loss.importance_minimality.coeff,eval/ci_l0_0/total
  python -m pdlightning.runs --best loss/total --filter size=medium""",
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="runs, sweeps, or above (outputs)")
    how = "keep runs where it holds: < <= > >= = != or ~ (contains); several must all hold"
    parser.add_argument("--filter", action="append", default=[], metavar="'KEY<VALUE'", help=how)
    parser.add_argument("--sort", metavar="KEY", help="by this, least first; runs without it last")
    parser.add_argument("--reverse", action="store_true", help="greatest first")
    parser.add_argument("--columns", metavar="KEY,...", help="show these in the place of the usual ones")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--best", metavar="METRIC", help="only the finished run with the least of it")
    parser.add_argument("--max", action="store_true", help="with --best: the greatest")
    return parser


def listing(arguments: argparse.Namespace) -> str:
    """What the command prints."""
    folders = arguments.folders or [Path("outputs")]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise ConfigError(f"{', '.join(missing)}: there is no such folder.")
    runs = find_runs(folders)
    if not runs:
        raise ConfigError(f"There is no run in or below {', '.join(map(str, folders))}.")
    query = Query(runs)
    for text in arguments.filter:
        holds = condition(text, query)
        runs = [run for run in runs if holds(run)]
    if not runs:
        raise ConfigError(f"No run is left by {' and '.join(arguments.filter)}.")
    if arguments.best:
        runs = [best(runs, query, arguments.best, greatest=arguments.max)]
    if arguments.sort:
        runs = query.sorted(runs, arguments.sort, reverse=arguments.reverse)
    elif arguments.reverse:
        runs = sorted(runs, key=lambda run: by_number(run.folder), reverse=True)
    columns = arguments.columns.split(",") if arguments.columns else None
    if arguments.csv:
        write_csv(runs, arguments.csv, columns or ())
    if arguments.best:
        return "\n".join(
            [f"{arguments.best} {cell(query.value(runs[0], query.resolve(arguments.best)))}  {runs[0].folder}"]
        )
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else None
    top = common_folder(runs)
    lines = [f"{len(runs)} run{'s' * (len(runs) != 1)} in {os.path.relpath(top)}", *table(runs, columns, width=width)]
    return "\n".join([*lines, *share_lines(runs)])


def best(runs: Sequence[Run], query: Query, metric: str, *, greatest: bool = False) -> Run:
    key = query.resolve(metric)
    judged = [run for run in runs if run.state == "finished" and is_number(query.value(run, key))]
    if not judged:
        raise ConfigError(f"--best {metric}: no finished run has a number there.")
    return (max if greatest else min)(judged, key=lambda run: query.value(run, key))


def is_number(value: Any) -> bool:
    """No verdict, and not nan, which is not the best of anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def main() -> None:
    try:
        print(listing(parser().parse_args()))
    except ConfigError as error:
        sys.exit(str(error))
    except BrokenPipeError:  # `| head`
        sys.stderr.close()


if __name__ == "__main__":
    main()
