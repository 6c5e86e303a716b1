"""The Markdown of a sweep, from folders written by hand."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from run_folders import config_of, write_run

from pdlightning.config import ConfigError
from pdlightning.statistics import document

CURVE = [[25, 5.0], [50, 4.0], [100, 3.0]]


def write(
    folder: Path, *, seed: int, curve: list[list[float]] | None = None, scale: float = 1.0, **changes: Any
) -> None:
    write_run(folder, config_of(seed=seed, **changes), scale=scale)
    summary = json.loads((folder / "summary.json").read_text())
    summary["target"] = {"check": "fine"} if curve is None else {"check": "fine", "validation_curve": curve}
    (folder / "summary.json").write_text(json.dumps(summary))


def rows_of(text: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


def test_every_metric_has_its_moments_over_the_seeds(tmp_path: Path) -> None:
    values = [1.0, 1.5, 4.0]
    for seed, scale in enumerate(values):
        write(tmp_path / str(seed), seed=seed, scale=scale)
    text = document([tmp_path])
    assert text.startswith("## toy\n") and "3 runs of 3 seeds. Solved: 2 of 3" in text
    moments = [statistics.mean(values), statistics.stdev(values), 1.0, 4.0]
    assert rows_of(text)["`loss/total`"] == [*(f"{1e-9 * x:.4g}" for x in moments), "3"]
    assert list(rows_of(text))[1] == "`ci_l0_0.1/total`", "the goal comes first"


def test_runs_that_differ_in_more_than_the_seed_are_told_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        for steps in (100, 200):
            write(tmp_path / f"{seed}_{steps}", seed=seed, steps=steps, runtime={"devices": 1 + seed})
    text = document([tmp_path])
    assert [line for line in text.splitlines() if line.startswith("##")] == ["## toy, steps=100", "## toy, steps=200"]
    assert text.count("2 runs of 2 seeds.") == 2


def test_one_run_has_no_deviation_and_unfinished_ones_are_named(tmp_path: Path) -> None:
    write(tmp_path / "0", seed=0)
    write_run(tmp_path / "1", config_of(seed=1), ended=False)
    text = document([tmp_path])
    assert rows_of(text)["`loss/total`"] == ["1e-09", "-", "1e-09", "1e-09", "1"]
    assert "1 run of 1 seed." in text and text.endswith("Left out, as they have not finished: 1 (unfinished).")


def test_training_compute_recovered_is_read_off_the_curve_of_the_target(tmp_path: Path) -> None:
    """0.25 nats above the end lie a quarter of the way from 100 to 50 steps: 2**-0.25."""
    for seed in (0, 1):
        write(tmp_path / str(seed), seed=seed, curve=CURVE)
    share = f"{2**-0.25:.4g}"
    assert rows_of(document([tmp_path]))["training compute recovered, ci"] == [share, "0", share, share, "2"]


def test_a_decomposition_worse_than_the_beginning_has_only_a_bound(tmp_path: Path) -> None:
    write(tmp_path / "0", seed=0, curve=[[80, 3.1], [100, 3.0]])
    found = rows_of(document([tmp_path]))["training compute recovered, ci"]
    assert found == ["<= 0.8", "-", "<= 0.8", "<= 0.8", "1"]
    write(tmp_path / "1", seed=1, curve=[[60, 3.4], [90, 3.25], [100, 3.0]])
    found = rows_of(document([tmp_path]))["training compute recovered, ci"]
    assert found == ["<= 0.85", "0.07071", "<= 0.8", "0.9", "2"], "the greatest is known, the others may be less"


def test_without_a_curve_nothing_is_invented(tmp_path: Path) -> None:
    write(tmp_path / "0", seed=0)
    assert "recovered: none, as the record of the target has no validation curve" in document([tmp_path])


def test_nothing_to_tell_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        document([tmp_path / "absent"])
    with pytest.raises(ConfigError, match="No run in or below .* has finished; there are 0 others"):
        document([tmp_path])
