"""Run folders written by hand, for the tests of the report: quick, and as large or as broken as a test wants."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import yaml

HOSTILE = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>\'"&'


def config_of(name: str = "toy", **changes: Any) -> dict[str, Any]:
    metric = {
        "fast": {"ci_l0_0.1": {"_target_": "pdlightning.metrics.CIL0", "threshold": 0.1}},
        "slow": {
            "mean_ci": {"_target_": "pdlightning.metrics.figures.MeanCIFigure"},
            "ce_kl": {"_target_": "pdlightning.metrics.CEandKL", "threshold": 0.0},
        },
    }
    return {
        "name": name,
        "seed": 0,
        "steps": 100,
        "goal": {"eval/ci_l0_0.1/total": {"max": 3.0}},
        "objective": "eval/loss/total",
        "metric": metric,
        "logging": {"log_every": 10, "swept": {}},
        "runtime": {"devices": 1},
        "target": {"_target_": "pdlightning.targets.TMS", "n_features": 5},
        "pd": {
            "sites": {"h.*": 8},
            "ci_fn": {"_target_": "pdlightning.modules.SharedMLP", "hidden": [16]},
            "losses": {
                "recon": {"_target_": "x.Y", "coeff": 1e-5},
                "later": {"coeff": {"start": 3.0, "kind": "cosine"}},
            },
        },
        **changes,
    }


def write_run(
    folder: Path,
    config: dict[str, Any],
    *,
    rows: int = 11,
    evaluated: bool = True,
    ended: bool = True,
    scale: float = 1.0,
) -> Path:
    """A run of `rows` rows; the last value of eval/ci_l0_0.1/total is 2 * scale."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    metrics = {
        "eval/loss/total": 1e-9 * scale,
        "eval/ci_l0_0.1/total": 2.0 * scale,
        "eval/ce_kl/ce_target": 2.5,
        "eval/ce_kl/kl_ci": 0.25,
        "eval/ce_kl/ce_ci": 2.75,
        "eval/ce_kl/ce_difference_ci": 0.25,
    }
    lines = []
    for i in range(rows):
        line: dict[str, Any] = {"step": 10 * i, "loss/recon": math.exp(-i / 3) * scale, "train/ci_l0": 20.0 / (1 + i)}
        lines.append(line | ({name: v * (rows - i) for name, v in metrics.items()} if evaluated else {}))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)) or ["step"])
        writer.writeheader()
        writer.writerows(lines)
    if ended:
        value = metrics["eval/ci_l0_0.1/total"]
        summary = {
            "experiment": config["name"], "steps": config["steps"], "seconds": 1.5, "steps_per_second": 66.7,
            "solved": value <= 3, "target": {"check": "all there"}, "metrics": metrics if evaluated else {},
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_sites(folder: Path, sites: dict[str, int], *, step: int = 100) -> dict[str, list[float]]:
    """Data of sites, site -> C; returns the mean ci of each."""
    mean_ci = {site: [round(10.0 ** (-6 * ((7 * c) % C) / C), 9) for c in range(C)] for site, C in sites.items()}
    data = {
        "step": step, "kind": "sites", "threshold": 0.1, "positions": 4096,
        "sites": {
            site: {
                "kind": "linear", "d_in": 4, "d_out": 6, "C": C, "l0": 1.25, "faithfulness": 3.2e-11,
                "relative_faithfulness": 1e-9, "mean_ci": mean_ci[site],
                "density": [min(1.0, x) for x in mean_ci[site]],
            } for site, C in sites.items()
        },
    }  # fmt: skip
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "sites_0.1.json").write_text(json.dumps(data))
    return mean_ci


def write_examples(folder: Path, *tokens: str) -> None:
    example = {"row": 1, "position": 2, "peak": 0, "tokens": list(tokens), "ci": [1.0] + [0.0] * (len(tokens) - 1)}
    subcomponent = {"index": 17, "mean_ci": 0.01, "peak": 1.0, "density": 0.02, "ranks": [1, 2], "examples": [example]}
    other = {**subcomponent, "index": 3, "examples": [{**example, "tokens": ["nothing"] * len(tokens)}]}
    sites = [{"path": "h.0", "C": 30, "n_firing": 2, "subcomponents": [subcomponent, other]}]
    data = {
        "step": 100,
        "kind": "examples",
        "rows": 4,
        "positions": 64,
        "threshold": 0.1,
        "has_text": True,
        "sites": sites,
    }
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "examples_data.json").write_text(json.dumps(data))


def payload_of(page: str) -> dict[str, Any]:
    text = page.split('<script type="application/json" id="payload">')[1].split("</script>")[0]
    return json.loads(text)
