"""A run under FSDP2 that is stopped half-way goes on sharded, whole on each rank, or on one rank alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

SHARDED = ["runtime=fsdp", "runtime.devices=2", "runtime.accelerator=cpu", "runtime.compile=false"]
# Where ci is clamped, rounding turns the gradient of a logit at the kink: a smooth squashing shows what is left.
SMOOTH = "pd.squash=sigmoid"
WORDS = ["debug=fast", "metric=none", "~metric.slow.pgd_ladder", "logging.checkpoint_every=2", SMOOTH, *SHARDED]
EXPERIMENTS = {
    "tms_5-2": ["steps=100", "logging.eval_every=100", "logging.slow_eval_every=100"],
    "resid_mlp1": ["steps=60", "logging.eval_every=100", "logging.slow_eval_every=100"],
    "lm_tiny": ["steps=8"],
}
GOING_ON = {"fsdp": [], "ddp": ["runtime.strategy=ddp"], "one": ["runtime.devices=1"]}


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PDLIGHTNING_CACHE": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    call = [sys.executable, "-m", "pdlightning", *words]
    return subprocess.Popen(
        call, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(words: list[str], folder: Path) -> None:
    process = start(words, folder)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-2000:]


def stop_in_the_middle(words: list[str], folder: Path, run: Path, number: signal.Signals) -> None:
    process = start([*words, f"hydra.run.dir={run.name}"], folder)
    deadline = time.monotonic() + 200
    while not list(run.glob("checkpoints/*.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)[1][-2000:]
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and not (run / "summary.json").exists(), "it was stopped too late"
    assert number == signal.SIGKILL or "Stopped after step" in said, said[-2000:]
    time.sleep(1)  # ranks whose parent was killed end on their own


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_stopped_sharded_run_ends_where_the_undisturbed_one_does(experiment: str, tmp_path: Path) -> None:
    words = [f"experiment={experiment}", *WORDS, *EXPERIMENTS[experiment]]
    finish([*words, "hydra.run.dir=whole"], tmp_path)
    whole = load_file(tmp_path / "whole" / "decomposition" / "tensors.safetensors")
    for number in (signal.SIGINT, signal.SIGKILL):
        stop_in_the_middle(words, tmp_path, tmp_path / number.name, number)
        for name, changes in GOING_ON.items():
            again = tmp_path / f"{number.name}-{name}"
            shutil.copytree(tmp_path / number.name, again)
            finish([f"resume={again}", *changes], tmp_path)
            found = load_file(again / "decomposition" / "tensors.safetensors")
            assert found.keys() == whole.keys()
            for key, x in found.items():
                off = float((x - whole[key]).norm() / whole[key].norm())
                assert off == 0 if name == "fsdp" else off < 1e-5, (number.name, name, key, off)
