"""Runs with persistent adversaries: killed and resumed, looked at or not, refused before they begin (spec D1, D2)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run.conftest import summary_of, tensors_of, without_speed

from pdlightning import load_run
from pdlightning.checkpoints import checkpoints_by_step
from pdlightning.config import ConfigError
from pdlightning.run import run

Tiny = Callable[..., dict[str, Any]]
LOSSES = "faithfulness,importance_minimality,stochastic_recon,stochastic_recon_layerwise"
ADVERSARIES = "persistent_pgd_recon,merged_recon,particle_pool_recon"
WORDS = (f"loss=[{LOSSES},{ADVERSARIES}]", "metric=[vectors,tms,multi_batch_pgd]", "steps=12", "logging.log_every=3")
KILL = """
import json, os, signal, sys
from pathlib import Path
from pdlightning.decomposition import ParameterDecomposition
from pdlightning.run import run
after_backward = ParameterDecomposition.after_backward
def killed(self):
    if self.global_step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    after_backward(self)
ParameterDecomposition.after_backward = killed
run(json.loads(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(tiny(*WORDS, "logging.checkpoint_every=4"), folder)
    return folder


def test_a_killed_run_with_adversaries_is_resumed_bit_identically(tiny: Tiny, tmp_path: Path, whole: Path) -> None:
    config, folder = tiny(*WORDS, "logging.checkpoint_every=4"), tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILL, json.dumps(config), str(folder)], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in checkpoints_by_step(folder / "checkpoints")] == ["step=8.ckpt", "step=4.ckpt"]
    run(config, folder, resume=True)
    assert tensors_of(folder) == tensors_of(whole)
    assert without_speed(folder) == without_speed(whole)


def test_looking_at_a_run_moves_no_source(tiny: Tiny, tmp_path: Path, whole: Path) -> None:
    often = tiny(*WORDS, "logging.eval_every=1", "logging.slow_eval_every=2", "logging.checkpoint_every=1")
    run(often, tmp_path / "run")
    assert b"persistent_pgd_recon.source.held.linear1:source.value" in tensors_of(whole)
    held = [
        {k: v for k, v in load_run(folder).decomposition.state_dict().items() if not k.startswith("step")}
        for folder in (whole, tmp_path / "run")
    ]
    assert held[0].keys() == held[1].keys() and all(held[0][k].equal(held[1][k]) for k in held[0])


def test_a_loaded_run_measures_what_it_measured(whole: Path) -> None:
    measured, loaded = summary_of(whole)["metrics"], load_run(whole).evaluate()
    assert {"eval/loss/merged_recon", "eval/multi_batch_pgd_recon"} <= measured.keys()
    assert loaded == measured


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("source.scope=repeat", "source.n_sources=3"),
            "loss.persistent_pgd_recon: .*n_sources=3 does not divide the 8",
        ),
        (("source.scope=repeat",), "scope repeat takes n_sources"),
        (("source.scope=per_sample",), "source.scope: expected one of .*did you mean 'per_sample_per_position'"),
        (("source.optimizer.beta=0.5",), "has no argument 'beta'; did you mean 'betas'"),
    ],
)
def test_a_config_that_cannot_be_is_refused_before_any_training(
    tiny: Tiny, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    config = tiny(*WORDS, *(f"++loss.persistent_pgd_recon.{word}" for word in words))
    with pytest.raises(ConfigError, match=said):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_scaled_loss_is_refused_before_any_training(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss\.\w+: .*precision=16-mixed has scaled"):
        run(tiny(*WORDS, "runtime.precision=16-mixed"), tmp_path / "run")
