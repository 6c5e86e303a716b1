"""`python -m pdlightning.runs`: every state of a run, filters, order, columns, shares; nothing heavy."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from scipy.stats import binomtest

from pdlightning import runs
from pdlightning.catalogue import find_runs
from pdlightning.config import ConfigError


def write(folder: Path, **changes: Any) -> Path:
    """A finished run, as far as the table reads it."""
    config = {
        "name": "e", "steps": 4, "seed": 0, "labels": None, "pd": {"seed": 0}, "logging": {"swept": {}},
        "loss": {"importance_minimality": {"coeff": 1e-3}, "faithfulness": {"coeff": 1.0}},
    }  # fmt: skip
    summary = {
        "experiment": "e", "name": "e", "tags": [], "labels": {}, "swept": {}, "steps": 4, "seconds": 2.0,
        "solved": None, "metrics": {"eval/loss/total": 1.0},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changes.pop("config", {})))
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two coefficients, ten seeds each, of which eight and two are solved; one job is missing."""
    folder = tmp_path / "sweep"
    for number in range(20):
        coeff, seed = (1e-3, 3e-3)[number % 2], number // 2
        write(
            folder / f"{number}_coeff={coeff}_seed={seed}",
            swept={"loss.importance_minimality.coeff": coeff, "seed": seed},
            solved=seed < (8, 2)[number % 2],
            metrics={"eval/loss/total": 1e-9 * (20 - number), "eval/match_a/mmcs": 0.5, "eval/match_b/mmcs": number},
            labels={"size": "small" if number < 10 else "large"},
            config={"seed": seed, "loss": {"importance_minimality": {"coeff": coeff}, "faithfulness": {"coeff": 1.0}}},
        )
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"swept": [], "jobs": 21}))
    return folder


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # some library that another test imports sets it

    def said(*words: str) -> list[str]:
        return runs.listing(runs.parser().parse_args(words)).splitlines()

    return said


def test_the_table_has_jobs_in_order_and_the_share_by_what_is_not_the_seed(
    sweep: Path, listing: Callable[..., list[str]]
):
    lines = listing("sweep")
    assert lines[0] == "20 runs in sweep"
    assert lines[1].split() == [
        "run", "state", "coeff", "seed", "size", "solved", "seconds", "loss/total", "match_a/mmcs", "match_b/mmcs",
    ]  # fmt: skip
    assert [line.split()[0].partition("_")[0] for line in lines[2:22]] == [str(n) for n in range(20)]
    assert lines[2].split()[1:] == ["finished", "0.001", "0", "small", "solved", "2", "2e-08", "0.5", "0"]
    assert lines[22:] == [
        "20 of 21 jobs have finished",
        "coeff=0.001: solved: 8 of 10 (80%, 95 % interval 49% to 94%)",
        "coeff=0.003: solved: 2 of 10 (20%, 95 % interval 6% to 51%)",
    ]


def test_a_filter_takes_no_job_from_those_that_have_finished(sweep: Path, listing: Callable[..., list[str]]):
    assert listing("sweep", "--filter", "coeff=0.001", "--filter", "seed>6")[-2:] == [
        "20 of 21 jobs have finished",
        "coeff=0.001: of these solved: 1 of 3 (33%, 95 % interval 6% to 79%)",
    ]


def test_the_objective_of_a_sweep_is_among_the_columns(sweep: Path, listing: Callable[..., list[str]]):
    for folder in sweep.glob("*_*"):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, "objective": "eval/attack"}))
        summary = json.loads((folder / "summary.json").read_text())
        summary["metrics"]["eval/attack"] = 0.25
        (folder / "summary.json").write_text(json.dumps(summary))
    lines = listing("sweep")
    assert lines[1].split()[7:9] == ["attack", "loss/total"] and lines[2].split()[7] == "0.25"


@pytest.mark.parametrize(("solved", "of"), [(0, 4), (8, 10), (24, 24), (1, 1000)])
def test_the_interval_is_wilsons(solved: int, of: int):
    expected = binomtest(solved, of).proportion_ci(method="wilson")
    assert runs.wilson_interval(solved, of) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["seed<2"], [0, 1, 2, 3]),
        (["seed>=9", "coeff=3e-3"], [19]),
        (["importance_minimality.coeff!=0.001", "seed=4"], [9]),
        (["size=large", "loss/total<=2e-9"], [18, 19]),
        (["metrics.eval/match_b/mmcs>18"], [19]),
        (["match_b/mmcs>18"], [19]),
        (["solved=true", "coeff=0.003"], [1, 3]),
        (["labels.size~SMA", "seed=0"], [0, 1]),
        (["experiment=e", "state=finished", "pd.seed=0", "seed=3"], [6, 7]),
        (["folder~18_coeff"], [18]),
    ],
)
def test_filters(words: list[str], numbers: list[int], sweep: Path, listing: Callable[..., list[str]]):
    lines = listing("sweep", *(word for text in words for word in ("--filter", text)))
    assert [int(line.split("_")[0]) for line in lines[2 : 2 + len(numbers)]] == numbers
    assert lines[0].startswith(f"{len(numbers)} run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--filter", "seeed<1"], "No run has 'seeed'; did you mean 'seed'?"),
        (["--filter", "mmcs>0"], "mmcs may be eval/match_a/mmcs, eval/match_b/mmcs: say more of it"),
        (["--filter", "seed"], "expected KEY<VALUE"),
        (["--filter", "seed<"], "expected KEY<VALUE"),
        (["--filter", "seed<few"], "< compares numbers, and few is none"),
        (["--filter", "seed>99"], "No run is left by seed>99"),
        (["--filter", "__import__('os').getcwd()=1"], "No run has"),
        (["--sort", "nothing"], "No run has 'nothing'"),
        (["--best", "solved"], "no finished run has a number there"),
        (["--filter", "los/total<1"], "did you mean 'eval/loss/total'?"),
        (["--best", "experiment"], "no finished run has a number there"),
        (["nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_mistakes_are_a_sentence(words: list[str], message: str, sweep: Path, listing: Callable[..., list[str]]):
    with pytest.raises(ConfigError) as error:
        listing("sweep", *words)
    assert message in str(error.value) and not str(error.value).endswith("?.")


def test_what_was_swept_comes_before_other_settings_of_the_same_end(sweep: Path, listing: Callable[..., list[str]]):
    assert len(listing("sweep", "--filter", "coeff=1e-3")) > 10
    assert listing("sweep", "--filter", "faithfulness.coeff=1", "--filter", "seed=1")[0].startswith("2 runs")


def test_order_columns_best_and_csv(sweep: Path, listing: Callable[..., list[str]], tmp_path: Path):
    lines = listing("sweep", "--sort", "loss/total", "--columns", "seed,faithfulness.coeff", "--csv", "all.csv")
    assert len({*(header := (tmp_path / "all.csv").read_text().splitlines()[0].split(","))}) == len(header)
    assert "config.seed" not in header
    assert lines[1].split() == ["run", "state", "seed", "faithfulness.coeff"] and lines[2].split()[0].startswith("19_")
    assert lines[2].split()[2:] == ["9", "1"]
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 and rows[0]["folder"] == "sweep/19_coeff=0.003_seed=9"
    assert float(rows[0]["eval/loss/total"]) == 1e-9 and rows[0]["labels.size"] == "large"
    assert rows[0]["config.loss.faithfulness.coeff"] == "1.0" and rows[0]["loss.importance_minimality.coeff"] == "0.003"
    assert listing("sweep", "--best", "loss/total") == ["loss/total 1e-09  sweep/19_coeff=0.003_seed=9"]
    assert listing("sweep", "--best", "loss/total", "--max")[0].endswith("/0_coeff=0.001_seed=0")
    assert listing("sweep", "--reverse")[2].split()[0].startswith("19_")


def test_the_table_fits_its_width_and_names_what_does_not(sweep: Path):
    found = find_runs([sweep])
    lines = runs.table(found, width=72)
    assert all(len(line) <= 72 for line in lines[:-1])
    assert lines[-1].startswith("  not in this width: ") and "match_b/mmcs" in lines[-1]
    assert all(len(line) <= 40 for line in runs.table(found, ["seed"], width=40)[:-1])


def test_every_kind_of_damage_is_a_state(tmp_path: Path, listing: Callable[..., list[str]]):
    sweep = tmp_path / "sweep"
    write(sweep / "0")
    (write(sweep / "1") / "summary.json").write_text('{"metrics": ')
    (write(sweep / "2") / "summary.json").write_text('{"metrics": []}')
    (write(sweep / "3") / "summary.json").unlink()
    (sweep / "3" / "metrics.csv").write_text("step,eval/loss/total,loss/total\n2,0.5,9\n4,,8\n")
    (write(sweep / "4") / "summary.json").unlink()
    (sweep / "4" / "config.yaml").write_text("a: [")
    (sweep / "4" / "metrics.csv").write_bytes(b"\xff\x00\x01")
    (sweep / "5").mkdir()
    (sweep / "5" / "error.txt").write_text("the reason\nmore of it\n")
    (sweep / "6").mkdir()
    (sweep / "6" / "error.txt").write_text("Traceback (most recent call last):\n  x\nValueError: last words\n")
    (write(sweep / "7") / "summary.json").unlink()
    (sweep / "7" / "config.yaml").write_text("")
    (write(sweep / "8") / "summary.json").unlink()
    (sweep / "multirun.yaml").write_text("")
    with FileLock(sweep / "8" / ".running"):
        lines = listing(".")
    states = {line.split()[0]: line.split()[1] for line in lines[2:11]}
    assert states == {
        "0": "finished", "1": "broken", "2": "broken", "3": "unfinished", "4": "broken", "5": "broken", "6": "broken",
        "7": "broken", "8": "running",
    }  # fmt: skip
    assert lines[5].split()[-1] == "0.5"  # the last evaluation, not the last training loss
    assert lines[11:] == [
        "broken:", "  1: summary.json is damaged", "  2: summary.json is damaged", "  4: config.yaml is damaged",
        "  5: the reason", "  6: ValueError: last words", "  7: config.yaml is damaged", "1 of 9 jobs have finished",
    ]  # fmt: skip
    assert listing("sweep", "--filter", "state!=finished", "--csv", "all.csv")[0] == "8 runs in sweep"


def test_runs_are_found_at_any_depth_once_and_not_inside_runs(tmp_path: Path, listing: Callable[..., list[str]]):
    write(tmp_path / "outputs" / "a" / "one")
    write(tmp_path / "outputs" / "b" / "two" / "deep", experiment="f")
    write(tmp_path / "outputs" / "a" / "one" / "wandb" / "copy")
    lines = listing("outputs", "outputs/a", "outputs/a/one")
    assert lines[0] == "2 runs in outputs" and [line.split()[0] for line in lines[2:]] == ["a/one", "b/two/deep"]
    assert "experiment" in lines[1]
    assert listing()[0] == "2 runs in outputs"


def test_the_command_starts_without_anything_heavy(sweep: Path):
    code = (
        f"import sys; sys.argv[1:] = [{str(sweep)!r}, '--filter', 'seed<2']\nfrom pdlightning.runs import main\n"
        "main()\n"
        "heavy = ('torch', 'lightning', 'matplotlib', 'scipy', 'hydra', 'omegaconf', 'pandas')\n"
        "assert not [m for m in heavy if m in sys.modules], sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"coeff=0.001: of these solved" in done.stdout
