"""A run killed by SIGKILL again and again, and resumed each time, ends in the weights of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
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


def start(words: list[str], tmp_path: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(Path(__file__).parents[1] / "ranks"), *sys.path])
    environment = os.environ | {
        "PDLIGHTNING_CACHE": str(tmp_path / "cache"), "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.Popen([sys.executable, "-m", "pdlightning", *words], cwd=tmp_path, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_twenty_times_it_ends_in_the_same_weights(tmp_path: Path) -> None:
    assert start([*WORDS, "hydra.run.dir=whole"], tmp_path).wait() == 0
    moments, run = random.Random(0), tmp_path / "run"
    for _ in range(KILLS):
        begun = bool(list((run / "checkpoints").glob("*.ckpt")))
        if not begun:
            shutil.rmtree(run, ignore_errors=True)  # it was killed before its first checkpoint
        process = start(["resume=run"] if begun else [*WORDS, "hydra.run.dir=run"], tmp_path)
        time.sleep(moments.uniform(4, 12))  # while it starts, trains, evaluates or writes
        process.kill()
        process.wait()
    assert not (run / "summary.json").exists(), "it should still have been running at the last kill"
    assert start(["resume=run"], tmp_path).wait() == 0
    one, other = (load_file(tmp_path / name / "decomposition" / "tensors.safetensors") for name in ("whole", "run"))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "run")]
    assert len(rows[0]) == len(rows[1])
