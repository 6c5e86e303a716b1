"""The command line as a process: what answers at once, sweeps, and the wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from pdlightning.__main__ import CONF
from pdlightning.results import goals_met, result_table

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def imported_by(code: str) -> tuple[str, set[str]]:
    """What a program prints, and which heavy packages it imported."""
    heavy = ("torch", "lightning", "matplotlib", "transformers", "scipy", "wandb", "datasets")
    code += f"\nimport sys; print('HEAVY', *[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    printed, _, names = done.stdout.partition("HEAVY")
    return printed, set(names.split())


@pytest.mark.parametrize("words", [["--help"], ["experiment=tms_5-2", "--cfg", "job"]])
def test_help_and_cfg_answer_without_torch(words: list[str]):
    code = f"import sys; sys.argv[1:] = {words}\nfrom pdlightning.__main__ import main\nmain()"
    printed, heavy = imported_by(code)
    assert not heavy
    if words == ["--help"]:
        assert "experiment: gpt2, induction, llama3_8b-l18" in printed
        assert "python -m pdlightning experiment=tms_5-2" in printed
        assert len(printed.splitlines()) < 40
    else:
        assert "_target_: pdlightning.decomposition.ParameterDecomposition" in printed


def test_importing_the_package_imports_nothing_heavy():
    assert imported_by("import pdlightning")[1] == set()


def test_the_result_table_gives_goals_their_verdict_and_tiny_numbers_their_digits():
    config = {
        "goal": {
            "eval/identity/tol_0.1": {"max": 0},
            "eval/match/ml2r": {"min": 0.99, "max": 1.01},
            "eval/x": {"min": 1},
        },
        "metric": {"fast": {"identity": {"n_features": 5}}, "slow": {}},
    }
    metrics = {
        "eval/identity/tol_0.1": 0,
        "eval/identity/recovered": 5,
        "eval/match/ml2r": 0.9,
        "eval/loss/total": 3e-12,
    }
    solved = goals_met(config["goal"], metrics)
    summary = {
        "experiment": "e",
        "solved": solved,
        "steps": 3,
        "seconds": 2.0,
        "steps_per_second": 1.5,
        "metrics": metrics,
    }
    lines = [line.split() for line in result_table(summary, config).splitlines()]
    assert ["e:", "NOT", "solved"] in lines
    assert ["identity/tol_0.1", "0", "<=", "0", "ok"] in lines
    assert ["match/ml2r", "0.9", ">=", "0.99", "and", "<=", "1.01", "MISSED"] in lines
    assert ["x", "not", "measured", ">=", "1", "MISSED"] in lines
    assert ["loss", "total", "3e-12"] in lines and ["identity", "tol_0.1", "0", "recovered", "5", "of", "5"] in lines
    assert goals_met({}, metrics) is None and goals_met({"eval/identity/tol_0.1": {"max": 0}}, metrics) is True


@pytest.mark.slow
def test_the_wheel_brings_its_conf_and_runs_anywhere(tmp_path: Path):
    built = tmp_path / "dist"
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", built, CONF.parent], check=True)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "--quiet", next(built.glob("*.whl"))], check=True)
    ours = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (ours / "environment.pth").write_text(next(p for p in sys.path if p.endswith("site-packages")) + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PDLIGHTNING_CACHE": str(tmp_path / "cache")
    }
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = [python, "-c", "import pdlightning.__main__ as m; print(m.CONF)"]
    assert str(ours) in subprocess.run(where, env=environment, cwd=elsewhere, capture_output=True, text=True).stdout
    words = ["experiment=tms_5-2", "debug=fast", "data.batch_size=8", "hydra.run.dir=here"]
    subprocess.run([python, "-m", "pdlightning", *words], env=environment, cwd=elsewhere, check=True)
    assert json.loads((elsewhere / "here" / "summary.json").read_text())["steps"] == 6


@pytest.mark.slow
def test_wandb_writes_its_run_without_a_key_or_a_network(tmp_path: Path, cache: Path):
    environment = ENVIRONMENT | {"WANDB_MODE": "offline"}
    environment.pop("WANDB_API_KEY", None)
    words = [
        "experiment=tms_5-2",
        "debug=fast",
        "data.batch_size=8",
        "logging=wandb",
        f"cache_dir={cache}",
        "hydra.run.dir=here",
    ]
    subprocess.run([sys.executable, "-m", "pdlightning", *words], env=environment, cwd=tmp_path, check=True)
    assert list((tmp_path / "here" / "wandb").glob("offline-run-*/run-*.wandb"))
