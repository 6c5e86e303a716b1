"""Ranks of our own under the command line: sweeps, ranks that die, Ctrl-C, and what cannot work."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdlightning.config import ConfigError
from pdlightning.launching import launch
from pdlightning.launching.launch import run_on_ranks

HERE = Path(__file__).parent
FAST = ["experiment=tms_5-2", "debug=fast", "runtime.devices=2", "metric=none", "~metric.slow.pgd_ladder"]
pytestmark = pytest.mark.timeout(180)


def environment(tmp_path: Path) -> dict[str, str]:
    path = os.pathsep.join([str(HERE), *sys.path])
    return os.environ | {"PDLIGHTNING_CACHE": str(tmp_path / "cache"), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def command(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "pdlightning", *words, *FAST]
    return subprocess.run(
        call, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=150, check=False
    )


def broken(how: str, *, at: int) -> list[str]:
    """Words that put other data in the place of the experiment's."""
    settings = {"_target_": "broken.BrokenFeatures", "how": how, "at": at, "n_features": 5, "batch_size": 16}
    return ["~data", "+data={" + ",".join(f"{key}:{value}" for key, value in settings.items()) + "}", "allow=[broken]"]


def test_a_sweep_gives_every_job_its_own_values_on_every_rank(tmp_path: Path) -> None:
    done = command(tmp_path, "-m", "seed=1,2", "hydra.sweep.dir=sweep")
    assert "2 " in done.stdout and done.returncode == 0, done.stderr[-2000:]
    for job, seed in (("0_seed=1", 1), ("1_seed=2", 2)):
        config = yaml.safe_load((tmp_path / "sweep" / job / "config.yaml").read_text())
        assert config["seed"] == config["pd"]["seed"] == seed and config["runtime"]["devices"] == 2
    first, second = (
        json.loads((tmp_path / "sweep" / job / "summary.json").read_text()) for job in ("0_seed=1", "1_seed=2")
    )
    assert first["metrics"] != second["metrics"]


@pytest.mark.parametrize(
    ("how", "said"), [("killed", "Rank 1 of 2 ended by signal 9 (SIGKILL)"), ("raises", "disk of rank 1 is on fire")]
)
def test_a_rank_that_dies_ends_the_others_and_is_heard(how: str, said: str, tmp_path: Path) -> None:
    began = time.monotonic()
    done = command(tmp_path, *broken(how, at=3), "hydra.run.dir=run")
    assert done.returncode == 1 and said in done.stderr, done.stderr[-2000:]
    assert time.monotonic() - began < 120
    assert not list((tmp_path / "run").glob("summary.json"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ctrl_c_stops_all_ranks_after_the_same_step_and_resume_goes_on(strategy: str, tmp_path: Path) -> None:
    words = [*FAST, *broken("slow", at=3), f"runtime.strategy={strategy}", "hydra.run.dir=run", "steps=60",
             "logging.eval_every=100", "logging.slow_eval_every=100", "logging.checkpoint_every=100"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "pdlightning", *words], cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    rows = tmp_path / "run" / "metrics.csv"
    deadline = time.monotonic() + 90
    while not (rows.exists() and "\n4," in rows.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)[1][-2000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "Stopped after step" in said and "resume=" in said, said[-2000:]
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("step=*.ckpt"))
    assert 3 < int(checkpoint.stem.removeprefix("step=")) < 60
    resumed = subprocess.run(
        [sys.executable, "-m", "pdlightning", "resume=run"], cwd=tmp_path, env=environment(tmp_path), text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    with rows.open() as file:
        assert [row["step"] for row in csv.DictReader(file)][-1] == "60"


def test_a_batch_that_cannot_be_split_is_refused_in_a_sentence(tmp_path: Path) -> None:
    done = command(tmp_path, "data.batch_size=15", "hydra.run.dir=run")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "data.batch_size=15 cannot be split evenly over 2 ranks" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "variables", "said"),
    [
        ({"accelerator": "gpu", "devices": 64}, {}, "runtime.devices=64, but this machine has"),
        ({"nodes": 2}, {}, "started by srun or torchrun"),
        ({"devices": 4}, {"RANK": "0", "WORLD_SIZE": "2"}, "one of 2 ranks .* start 4, or change"),
        ({"devices": 1}, {"RANK": "0", "WORLD_SIZE": "2"}, "one of 2 ranks .* start 1, or change"),
        ({}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, "one of 8 ranks"),
    ],
)
def test_ranks_that_cannot_be_are_refused_before_any_is_started(
    changes: dict[str, Any], variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    runtime = {"accelerator": "cpu", "devices": 2, "nodes": 1, "threads": None, **changes}
    with pytest.raises(ConfigError, match=said):
        run_on_ranks({"runtime": runtime}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rank_that_never_comes_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "PATIENCE", timedelta(seconds=2))
    with (
        pytest.raises(ConfigError, match="Rank 0 of 2 has waited 2 s for the others"),
        launch.joined({"runtime": {"accelerator": "cpu"}}, tmp_path),
    ):
        pass


def started_by_hand(folder: Path, words: Callable[[int], list[str]]) -> list[tuple[int, str]]:
    """The exit code and the standard error of two ranks that a launcher other than ours has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": str(port)}  # fmt: skip
        call = [sys.executable, "-m", "pdlightning", *FAST, *words(rank)]
        ranks.append(
            subprocess.Popen(call, cwd=folder, env=environment(folder) | variables, stderr=subprocess.PIPE, text=True)
        )
    return [(process.wait(), said) for process in ranks for _, said in [process.communicate(timeout=120)]]


def test_ranks_with_different_configs_all_say_so(tmp_path: Path) -> None:
    for code, said in started_by_hand(tmp_path, lambda rank: [f"seed={rank}", "hydra.run.dir=run"]):
        assert code == 1 and "Rank 1 has another config than rank 0" in said, said[-2000:]
        assert "seed" in said
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_ranks_that_began_in_different_seconds_share_the_folder_of_the_first(tmp_path: Path) -> None:
    for code, said in started_by_hand(tmp_path, lambda rank: [f"hydra.run.dir=second_{rank}"]):
        assert code == 0, said[-2000:]
    assert (tmp_path / "second_0" / "summary.json").is_file() and not (tmp_path / "second_1").exists()


def test_a_sharded_model_is_evaluated_and_drawn_like_a_whole_one(tmp_path: Path) -> None:
    for name, words in (("one", ["runtime.devices=1"]), ("parts", ["runtime.strategy=fsdp"])):
        call = [sys.executable, "-m", "pdlightning", *FAST[:3], *words, f"hydra.run.dir={name}"]
        done = subprocess.run(
            call, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=150
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, parts = (json.loads((tmp_path / name / "summary.json").read_text())["metrics"] for name in ("one", "parts"))
    assert parts == pytest.approx(one, rel=1e-5)
    figures = [sorted(path.name for path in (tmp_path / name / "figures").iterdir()) for name in ("one", "parts")]
    assert figures[0] == figures[1] and len(figures[0]) > 3


def test_torchrun_starts_the_ranks_too(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pdlightning"]
    done = subprocess.run(
        [*call, *FAST], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "outputs" / "tms_5-2").iterdir()
    assert (folder / "summary.json").is_file()
