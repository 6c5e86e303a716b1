"""`python -m pdlightning.compare RUN_A RUN_B`: how similar two decompositions are. Heavy imports wait for the words."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdlightning.results import aligned

if TYPE_CHECKING:
    from pdlightning.analysis.comparison import Row
    from pdlightning.modules.component_model import ComponentsBySite

FIRING = "0.001"


def table(lines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name of a site, or `all` -> its numbers, as columns."""
    heads = ["site", "C", "compared", "MMCS A to B", "MMCS B to A", "matched cosine", "pairs", "target weights"]

    def line(name: str, n: Mapping[str, Any]) -> list[str]:
        return [
            name,
            f"{n['C_a']}, {n['C_b']}",
            f"{n['compared_a']}, {n['compared_b']}",
            *(four_digits(n[key]) for key in ("mmcs_a_to_b", "mmcs_b_to_a", "mean_matched_cosine")),
            f"{n['pairs']} {n['matching']}",
            "the same" if n["target_difference"] == 0 else f"differ by {n['target_difference']:.2g}",
        ]

    return aligned([heads, *(line(name, n) for name, n in lines.items())])


def four_digits(value: float | None) -> str:
    """Rounded down, so that only what is 1 reads as 1."""
    return "-" if value is None else f"{int(value * 1e4) / 1e4:.4f}"


def remarks(found: Mapping[str, Row], a: ComponentsBySite, b: ComponentsBySite) -> list[str]:
    """What one must know to read the table."""
    from pdlightning.analysis.comparison import in_words

    lines = []
    if other := [site for site, row in found.items() if row.target_difference > 0]:
        lines.append(
            f"The runs decompose different weights at {in_words(other)}: what differs may come from the targets."
        )
    for side, name in ((0, "A"), (1, "B")):
        if silent := [site for site, row in found.items() if not len(row.similarity.compared[side])]:
            lines.append(f"No subcomponent of {name} is left to compare at {in_words(silent)}.")
        if zero := sum(row.similarity.zero[side] for row in found.values()):
            lines.append(f"{zero} subcomponents of {name} have length 0, so no direction: they are left out.")
    for name, has, lacks in (("A", a, b), ("B", b, a)):
        if alone := [site for site in has if site not in lacks]:
            lines.append(f"Only {name} has the sites {in_words(alone)}.")
    return lines


def csv_text(lines: Mapping[str, Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["site", *next(iter(lines.values()))])
    writer.writerows([name, *("" if v is None else v for v in line.values())] for name, line in lines.items())
    return text.getvalue()


def pairs_text(found: Mapping[str, Row]) -> str:
    rows = ["site,subcomponent_a,subcomponent_b,cosine"]
    for site, row in found.items():
        s = row.similarity
        pairs = zip(s.pairs.tolist(), s.matched.tolist(), strict=True)
        rows += [f"{site},{a},{b},{cosine}" for (a, b), cosine in pairs]
    return "\n".join(rows) + "\n"


def write(folder: Path, found: Mapping[str, Row], lines: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """compare.csv, compare.json, every pair in pairs.csv, and two figures of the sites that have pairs."""
    from pdlightning.figures.comparison import plot_similarity_histograms, plot_similarity_maps
    from pdlightning.storage import atomic_write, atomic_write_json, atomic_write_text

    atomic_write_text(folder / "compare.csv", csv_text(lines))
    atomic_write_json(folder / "compare.json", {**about, "sites": lines})
    atomic_write_text(folder / "pairs.csv", pairs_text(found))
    drawn = {site: row.similarity for site, row in found.items() if len(row.similarity.pairs)}
    if not drawn:
        return
    figures = {
        "similarity_histogram": plot_similarity_histograms(
            {site: s.best for site, s in drawn.items()}, {site: s.matched for site, s in drawn.items()}
        ),
        "similarity_map": plot_similarity_maps(
            {site: s.picture for site, s in drawn.items()},
            {site: (len(s.compared[0]), len(s.compared[1])) for site, s in drawn.items()},
        ),
    }
    for name, figure in figures.items():
        atomic_write(folder / f"{name}.png", lambda file, figure=figure: figure.savefig(file, format="png"))


def command(arguments: argparse.Namespace) -> None:
    from pdlightning import load_run
    from pdlightning.analysis.comparison import compare_runs, numbers, total

    firing = None if arguments.firing == "all" else float(arguments.firing)
    a = load_run(arguments.run_a)
    b = a if arguments.run_a == arguments.run_b else load_run(arguments.run_b)
    found = dict(compare_runs(a, b, sites=arguments.sites, firing=firing))
    lines = {**{site: numbers(row) for site, row in found.items()}, "all": total(list(found.values()))}
    about = {"run_a": arguments.run_a, "step_a": a.step, "run_b": arguments.run_b, "step_b": b.step,
             "mean_ci_above": firing}  # fmt: skip
    kept = "" if firing is None else f" with mean ci > {arguments.firing} on the evaluation data of their run"
    print(f"A: {arguments.run_a}, step {a.step}\nB: {arguments.run_b}, step {b.step}")
    print(f"Cosine similarity of all subcomponents{kept}\n")
    said = [*table(lines), "", *remarks(found, a.decomposition.components, b.decomposition.components)]
    print("\n".join(said).rstrip())
    if arguments.out is not None:
        write(arguments.out, found, lines, about)
        print(f"Table, pairs and figures are in {arguments.out}")


def threshold(word: str) -> str:
    """`all`, or a number as it was written."""
    if word != "all":
        float(word)
    return word


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pdlightning.compare",
        description="Compare the rank-one subcomponents of two runs, site by site, whatever their order.",
    )
    parser.add_argument("run_a", metavar="RUN_A", help="a run: its folder, or whatever load_run takes")
    parser.add_argument("run_b", metavar="RUN_B", help="another one of the same target")
    parser.add_argument("--sites", metavar="PATTERN", default="*", help="only sites that fit, such as 'h.*.mlp.*'")
    parser.add_argument(
        "--firing",
        metavar="THRESHOLD",
        type=threshold,
        default=FIRING,
        help=f"only subcomponents with a greater mean ci on evaluation data (default {FIRING}), or all",
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="write compare.csv, compare.json and figures there")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    from pdlightning.commands import or_a_sentence, quiet_libraries

    quiet_libraries()
    or_a_sentence(lambda: command(arguments))


if __name__ == "__main__":
    main()
