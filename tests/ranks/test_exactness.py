"""1, 2 and 4 ranks follow one trajectory (spec D2), and go on from each other's checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adversaries import TERMS

TIMEOUT = 300
HERE = Path(__file__).parent

CASES: dict[str, dict[str, Any]] = {
    **{name: {"adversary": name, "data": "tokens" if i % 2 else "vectors"} for i, name in enumerate(TERMS)},
    "uniform, frequency": {
        "ci": "global",
        "terms": {"all": ("uniform", "all", "mse"), "layers": ("binomial", "each_site", "hidden")},
        "importance": {"beta": 0.5},
    },
    "pgd, moving frequency": {
        "ci": "chunkwise",
        "terms": {
            "own": ("pgd:random:per_position", "uniform_subset", "kl"),
            "one": ("pgd:random:shared", "all", "kl"),
        },
        "importance": {"beta": 0.5, "ema_halflife": 3.0},
    },
    "constant, smooth": {
        "ci": "reverse both",
        "terms": {"ci": ("constant:0.0", "all", "kl"), "bernoulli": ("uniform", "bernoulli", "hidden")},
        "importance": {"gamma": 0.3, "beta": 0.2, "reference_count": 7},
    },
}
IN_FLOAT32 = ["sign by sample", "adam by sample", "pool", "merged", *list(CASES)[-3:]]
GO_ON = ["adam by sample", "pool", "adam repeated", "pgd, moving frequency"]


def run(ranks: int, plans: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The results of one job on so many ranks, which all end, or are ended."""
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plans))
    command = [sys.executable, str(HERE / "job.py"), str(folder / "plan.json"), str(folder / "out.pt")]
    processes, logs = [], [folder / f"{rank}.log" for rank in range(ranks)]
    for rank, log in enumerate(logs):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "STORE": str(folder / "store"), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
            **({"TORCHELASTIC_RUN_ID": "tests"} if ranks > 1 else {}),
        }  # fmt: skip
        processes.append(subprocess.Popen(command, env=environment, stdout=log.open("wb"), stderr=subprocess.STDOUT))
    try:
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(TIMEOUT) == 0, log.read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
    return torch.load(folder / "out.pt")


def plan(
    name: str,
    *,
    strategy: str = "ddp",
    dtype: str = "float64",
    squash: str = "leaky_hard",
    save: Path | None = None,
    resume: Path | None = None,
) -> dict[str, Any]:
    case = {"data": "vectors", **CASES[name]}
    paths = {"save": None if save is None else str(save), "resume": None if resume is None else str(resume)}
    return {"name": name, "case": case, "strategy": strategy, "dtype": dtype, "squash": squash, **paths}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(1, [plan(name) for name in CASES], tmp_path_factory.mktemp("ranks") / "alone")


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, (state, rows) in found.items():
        there, logged = expected[name]
        assert state.keys() == there.keys(), name
        for key, x in state.items():
            torch.testing.assert_close(x, there[key], rtol=1e-10, atol=1e-12, msg=lambda m: f"{name}, {key}: {m}")  # noqa: B023
        for row, other in zip(rows, logged[-len(rows) :], strict=True):
            assert row == pytest.approx(other, rel=1e-10, abs=1e-12), name


@pytest.mark.timeout(2 * TIMEOUT)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_term_source_and_ci_function_follows_one_trajectory(
    ranks: int, strategy: str, alone: dict[str, Any], tmp_path: Path
) -> None:
    found = run(ranks, [plan(name, strategy=strategy) for name in CASES], tmp_path / "together")
    assert found.keys() == CASES.keys()
    assert_same(found, alone)


@pytest.mark.timeout(2 * TIMEOUT)
def test_float32_follows_one_trajectory_to_its_own_rounding(tmp_path: Path) -> None:
    """With a smooth squashing: where ci is clamped, rounding moves a logit over a kink, which turns its gradient.

    Then two runs of one rank that add in another order part by as much (1e-5 to 1e-3 here).
    """
    plans = [plan(name, dtype="float32", squash="sigmoid") for name in IN_FLOAT32]
    alone, found = run(1, plans, tmp_path / "alone"), run(2, plans, tmp_path / "together")
    for name in IN_FLOAT32:
        for row, other in zip(found[name][1], alone[name][1], strict=True):
            assert row == pytest.approx(other, rel=1e-5, abs=1e-7), name


@pytest.mark.timeout(4 * TIMEOUT)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_checkpoints_go_on_with_another_number_of_ranks(strategy: str, alone: dict[str, Any], tmp_path: Path) -> None:
    half, again = ({name: tmp_path / f"{part}{i}.ckpt" for i, name in enumerate(GO_ON)} for part in ("half", "again"))
    run(2, [plan(name, strategy=strategy, save=half[name]) for name in GO_ON], tmp_path / "two")
    assert_same(run(1, [plan(name, resume=half[name]) for name in GO_ON], tmp_path / "then one"), alone)
    plans = [
        plan(name, strategy=other, resume=half[name]) for name, other in zip(GO_ON, ["ddp", "fsdp"] * 2, strict=True)
    ]
    assert_same(run(4, plans, tmp_path / "then four"), alone)
    run(1, [plan(name, save=again[name]) for name in GO_ON], tmp_path / "one")
    plans = [plan(name, strategy=strategy, resume=again[name]) for name in GO_ON]
    assert_same(run(2, plans, tmp_path / "then two"), alone)
