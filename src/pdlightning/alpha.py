"""`python -m pdlightning.alpha RUN [RUN ...]`: the cost of decompositions against one fixed source r.

Heavy imports wait until the words are read.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pdlightning.results import aligned, number

if TYPE_CHECKING:
    from pdlightning.analysis.alpha import AlphaSweep


def sweep_runs(runs: list[str], points: int) -> dict[str, AlphaSweep]:
    """Run -> its sweep at as many evenly spaced r from 0 to 1."""
    from pdlightning import load_run
    from pdlightning.analysis.alpha import alpha_sweep
    from pdlightning.analysis.comparison import NotComparable

    if points < 2:
        raise NotComparable(f"--points {points}: a sweep from 0 to 1 has at least 2.")
    sources = [i / (points - 1) for i in range(points)]
    found = {name: alpha_sweep(load_run(name), sources) for name in runs}
    if len({tuple(sweep.values) for sweep in found.values()}) > 1:
        of_each = "; ".join(f"{name} has {', '.join(sweep.values)}" for name, sweep in found.items())
        raise NotComparable(f"These runs have other measures ({of_each}): sweep those of tokens and of vectors apart.")
    return found


def rows(found: Mapping[str, AlphaSweep]) -> list[list[str]]:
    """A line for each r, a column for each run and measure, the target's own value below."""
    columns = [(name, measure) for name, sweep in found.items() for measure in sweep.values]
    sources = next(iter(found.values())).sources
    heads = ["r", *(f"{measure} {name}" for name, measure in columns)]
    lines = [[number(r), *(number(found[n].values[m][i]) for n, m in columns)] for i, r in enumerate(sources)]
    if any(sweep.target for sweep in found.values()):
        own = [found[n].target for n, _ in columns]
        lines.append(["target", *(number(t[m]) if m in t else "" for t, (_, m) in zip(own, columns, strict=True))])
    return [heads, *lines]


def csv_text(found: Mapping[str, AlphaSweep]) -> str:
    """run, measure, r, value; r is `target` for the target itself."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "measure", "r", "value"])
    for name, sweep in found.items():
        for measure, values in sweep.values.items():
            writer.writerows([name, measure, r, value] for r, value in zip(sweep.sources, values, strict=True))
        writer.writerows([name, measure, "target", value] for measure, value in sweep.target.items())
    return text.getvalue()


def write(folder: Path, found: Mapping[str, AlphaSweep]) -> None:
    from pdlightning.figures.alpha import plot_alpha_sweep
    from pdlightning.storage import atomic_write, atomic_write_text

    figure = plot_alpha_sweep(
        next(iter(found.values())).sources,
        {name: sweep.values for name, sweep in found.items()},
        {name: sweep.target for name, sweep in found.items()},
    )
    atomic_write_text(folder / "alpha.csv", csv_text(found))
    atomic_write(folder / "alpha.png", lambda file: figure.savefig(file, format="png"))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pdlightning.alpha",
        description="Measure runs on their evaluation data with the masks ci + (1 - ci) r at all sites and positions, "
        "for values of r from 0 to 1: cross-entropy and KL of tokens, or the squared error of vectors.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run: its folder, or whatever load_run takes")
    parser.add_argument("--points", type=int, default=11, help="how many values of r (default 11)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="write alpha.csv and alpha.png there")
    return parser


def command(arguments: argparse.Namespace) -> None:
    found = sweep_runs(list(dict.fromkeys(arguments.runs)), arguments.points)
    print("\n".join(aligned(rows(found))))
    if arguments.out is not None:
        write(arguments.out, found)
        print(f"Table and figure are in {arguments.out}")


def main() -> None:
    arguments = parser().parse_args()
    from pdlightning.commands import or_a_sentence, quiet_libraries

    quiet_libraries()
    or_a_sentence(lambda: command(arguments))


if __name__ == "__main__":
    main()
