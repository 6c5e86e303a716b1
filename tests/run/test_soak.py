"""A run killed by SIGKILL again and again, and resumed each time, ends in the weights of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

KILLS = 20
SLOW = "{_target_:broken.BrokenFeatures,how:slow,at:0,n_features:5,batch_size:64,eval_batches:1}"
WORDS = [
    "experiment=tms_5-2", "steps=300", "check_target=false", "target_steps=4", "metric=none", "~data",
    f"+data={SLOW}", "allow=[broken]",
    "pd.faithfulness_warmup.steps=5", "logging.log_every=2", "logging.eval_every=10", "logging.slow_eval_every=30",
    "logging.checkpoint_every=4", "logging.progress=false",
    "loss=[faithfulness,importance_minimality,stochastic_recon,stochastic_recon_layerwise,persistent_pgd_recon]",
    "loss.persistent_pgd_recon.coeff=0.1",
]  # fmt: skip
RANKS = {1: [], 2: ["runtime=ddp", "runtime.devices=2", "runtime.accelerator=cpu", "runtime.compile=false"]}


def start(words: list[str], tmp_path: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(Path(__file__).parents[1] / "ranks"), *sys.path])
    environment = os.environ | {
        "PDLIGHTNING_CACHE": str(tmp_path / "cache"), "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.Popen([sys.executable, "-m", "pdlightning", *words], cwd=tmp_path, env=environment)


def processes_in(folder: Path) -> list[int]:
    """Those that work in the folder: a run and its ranks."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append(int(process.name))
        except OSError:  # it has just ended, or belongs to somebody else
            continue
    return sorted(found)


def newest_step(run: Path) -> int:
    return max((int(path.stem.removeprefix("step=")) for path in run.glob("checkpoints/step=*.ckpt")), default=0)


def wait_for_moment(process: subprocess.Popen[bytes], run: Path, moments: random.Random) -> None:
    """Until a random moment of the start, or one of the seconds after the next checkpoint."""
    if moments.random() < 0.4:
        time.sleep(moments.uniform(0, 8))
    else:
        before = newest_step(run)
        while newest_step(run) <= before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 3))  # it trains, evaluates or writes


def kill_one(process: subprocess.Popen[bytes], folder: Path, moments: random.Random) -> None:
    """Kill the run or one of its ranks: with it all of them end, soon and by themselves."""
    assert process.poll() is None, "it should still have been running"
    os.kill(moments.choice(processes_in(folder)), signal.SIGKILL)
    assert process.wait(60) != 0
    deadline = time.monotonic() + 20
    while left := processes_in(folder):
        assert time.monotonic() < deadline, f"processes {left} outlive their run"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_twenty_times_it_ends_in_the_same_weights(ranks: int, tmp_path: Path) -> None:
    words, moments, run = [*WORDS, *RANKS[ranks]], random.Random(0), tmp_path / "run"
    assert start([*words, "hydra.run.dir=whole"], tmp_path).wait() == 0
    for _ in range(KILLS):
        begun = newest_step(run) > 0
        if not begun:
            shutil.rmtree(run, ignore_errors=True)  # it was killed before its first checkpoint
        process = start(["resume=run"] if begun else [*words, "hydra.run.dir=run"], tmp_path)
        wait_for_moment(process, run, moments)
        kill_one(process, tmp_path, moments)
    assert start(["resume=run"], tmp_path).wait() == 0
    one, other = (load_file(tmp_path / name / "decomposition" / "tensors.safetensors") for name in ("whole", "run"))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "run")]
    assert len(rows[0]) == len(rows[1])
