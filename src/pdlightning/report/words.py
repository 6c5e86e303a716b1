"""The words of a report: what was decomposed, from where, what to look at first, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pdlightning.report.curves import Chart
from pdlightning.report.read import RunFiles
from pdlightning.results import VERDICT, number, time_taken

IN_USE = 0.001
"""Mean ci above which a subcomponent counts as used: a stray firing does not make it so."""


def verdict(run: RunFiles) -> tuple[str, str]:
    """In a word, and the colour of it."""
    if run.summary is None:
        return "not finished", "wait"
    word = VERDICT[run.summary["solved"]]
    return word, {True: "good", False: "bad", None: "plain"}[run.summary["solved"]]


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """What was decomposed and how, in a few words each."""
    pd, config, summary = run.config["pd"], run.config, run.summary
    target = config["target"]
    model = target.get("model", target)
    said = [
        ("target", f"{class_of(model)} {plain_arguments(model)}".strip()),
        ("sites", ", ".join(f"{pattern}: C {C}" for pattern, C in pd["sites"].items())),
        ("ci function", f"{class_of(pd['ci_fn'])} {plain_arguments(pd['ci_fn'])}".strip()),
        ("losses", ", ".join(name + coefficient(loss) for name, loss in pd["losses"].items())),
        ("steps", f"{run.last_step:,} of {config['steps']:,}" if summary is None else f"{summary['steps']:,}"),
    ]
    if summary is not None:
        said.append(("time", time_taken(summary)))
        check = (summary.get("target") or {}).get("check")
        said += [("target check", check)] if check else []
    if config.get("init_from") is not None:
        said.append(("started from", config["init_from"]))
    return said


def commit(run: RunFiles) -> str:
    """Its hash, whose first ten digits are enough to find it; empty where none was recorded."""
    git = run.environment.get("git")
    if not git:
        return ""
    return git["commit"][:10] + (" with changes" if git["dirty"] else "")


def origin(run: RunFiles) -> list[tuple[str, str]]:
    """Where and with what it was run."""
    found, there = [("folder", str(run.folder.absolute()))], run.environment
    if not there:
        return [*found, ("environment", "not recorded (no environment.json)")]
    if there.get("git"):
        changed = ", with changes that stand in code.diff" if there["git"]["dirty"] else ""
        found.append(("commit", there["git"]["commit"] + changed))
    versions = {name: version for name, version in there["versions"].items() if version is not None}
    return [
        *found,
        ("machine", f"{there['machine']}, {there['platform']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def class_of(settings: Any) -> str:
    return settings["_target_"].rpartition(".")[2] if isinstance(settings, Mapping) and "_target_" in settings else ""


def plain_arguments(settings: Any) -> str:
    """Its arguments that are numbers, words or lists of them."""
    if not isinstance(settings, Mapping):
        return str(settings)
    plain = {k: v for k, v in settings.items() if not k.startswith("_") and not isinstance(v, Mapping | None)}
    return ", ".join(f"{k} {json.dumps(v) if isinstance(v, bool) else v}" for k, v in plain.items())


def coefficient(loss: Mapping[str, Any]) -> str:
    coeff = loss.get("coeff", 1.0)  # a loss of another package may know none
    if isinstance(coeff, Mapping):
        return f" × {coeff['start']:g} ({coeff['kind']})" if {"start", "kind"} <= coeff.keys() else " × a schedule"
    return f" × {coeff:g}"


def tiles(run: RunFiles) -> list[tuple[str, str, str]]:
    """The few numbers that one looks for first: (name, value, further words)."""
    metrics = run.metrics
    found = []
    for name, label in (
        ("eval/loss/total", "total loss"),
        ("eval/loss/faithfulness", "faithfulness"),
        ("eval/pgd_recon", "error under attack"),
        ("eval/ce_kl/ce_difference_stochastic", "CE lost, stochastic masks"),
        ("eval/ce_kl/kl_ci", "KL, ci masks"),
    ):
        if name in metrics:
            found.append((label, number(metrics[name]), name.removeprefix("eval/")))
    l0 = [name for name in metrics if name.startswith("eval/ci_l0") and name.endswith("/total")]
    if l0:
        threshold = l0[-1].removeprefix("eval/ci_l0_").removesuffix("/total")
        found.insert(1, ("mean L0, all sites", number(metrics[l0[-1]]), f"ci > {threshold}"))
    if "sites" in run.data:
        sites = run.data["sites"]["sites"].values()
        firing = sum(sum(value > IN_USE for value in site["mean_ci"]) for site in sites)
        found.insert(
            2, ("subcomponents in use", f"{firing:,}", f"mean ci > {IN_USE:g}, of {sum(s['C'] for s in sites):,}")
        )
    return found


def missing(run: RunFiles, curves: Sequence[Chart]) -> list[str]:
    """A sentence for each part that a reader would look for in vain."""
    notes = []
    if run.summary is None:
        notes.append(
            f"This run has not come to its end (no summary.json): {run.last_step:,} of {run.config['steps']:,} steps"
            f" are in metrics.csv. Go on with it by resume={run.folder}"
        )
    if not run.rows:
        notes.append("Nothing was logged yet: metrics.csv is missing or empty, so there are no curves.")
    elif not curves:
        notes.append("Every number was measured once only, so there are no curves.")
    if not run.metrics:
        notes.append("This run was never evaluated, so there are no goals, figures or numbers of an evaluation.")
    elif "sites" not in run.data:
        notes.append(
            "No numbers of the single sites: this run has no pdlightning.metrics.SiteTable among its metrics, so the "
            "table of the sites and the ci spectrum are missing."
        )
    if run.metrics and not run.pictures:
        notes.append("This run has no figures.")
    return notes
