"""What a SLURM cluster would be given, and what a job does when its time is up; no cluster is here."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdlightning.config import ConfigError

pytest.importorskip("submitit", reason="pip install 'pdlightning[slurm]'")


def test_the_script_asks_for_what_the_runtime_says() -> None:
    from pdlightning.slurm import script

    words = ["experiment=tms_5-2", "runtime=ddp", "runtime.devices=4", "runtime.nodes=2"]
    text = script([*words, "hydra.launcher.partition=gpu", "hydra.launcher.mem_gb=64", "hydra.launcher.timeout_min=90"])
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "partition=gpu", "mem=64GB", "time=90", "requeue",
                 "job-name=tms_5-2", "signal=USR2@300"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in text, text
    assert "\nsrun " in text


def test_a_setting_that_is_missing_or_wrong_is_refused() -> None:
    from pdlightning.slurm import script

    with pytest.raises(ConfigError, match="runtime.devices"):
        script(["experiment=tms_5-2", "runtime=ddp"])
    with pytest.raises(ConfigError, match="runtime.nodes"):
        script(["experiment=tms_5-2", "runtime.nodes=none"])


@pytest.mark.timeout(180)
def test_usr1_leaves_a_checkpoint_and_queues_the_job_again(tmp_path: Path) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    environment = os.environ | {
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "OMP_NUM_THREADS": "1",
        "PDLIGHTNING_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    words = ["experiment=tms_5-2", "debug=fast", "steps=100000", "logging.eval_every=50000",
             "logging.slow_eval_every=50000", "logging.checkpoint_every=50000", "hydra.run.dir=run"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "pdlightning", *words], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    rows, deadline = tmp_path / "run" / "metrics.csv", time.monotonic() + 90
    while not (rows.exists() and "\n2," in rows.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "SLURM job 4711 was queued again" in said, said[-2000:]
    assert (tmp_path / "said").read_text() == "requeue 4711\n"
    assert len(list((tmp_path / "run" / "checkpoints").glob("step=*.ckpt"))) == 1
