"""Spec D1 and D2: what is logged changes nothing, and an interrupted run ends as if it had not been."""

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
import torch
from run.conftest import rows_of, summary_of, tensors_of, without_speed

from pdlightning.callbacks import Interrupted, RunCheckpoint
from pdlightning.checkpoints import checkpoints_by_step
from pdlightning.decomposition import ParameterDecomposition
from pdlightning.run import run

Tiny = Callable[..., dict[str, Any]]
LONG = (
    "steps=50",
    "logging.log_every=7",
    "logging.eval_every=15",
    "logging.slow_eval_every=30",
    "logging.checkpoint_every=10",
)
KILLED_AT = 37


@pytest.fixture(scope="module")
def uninterrupted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(tiny(*LONG), folder)
    return folder


def assert_same(one: Path, other: Path) -> None:
    assert tensors_of(one) == tensors_of(other)
    assert without_speed(one) == without_speed(other)
    assert summary_of(one)["metrics"] == summary_of(other)["metrics"]


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: signal.Signals) -> None:
    """Sends this process signals in the middle of a step."""
    original = ParameterDecomposition.training_step

    def training_step(self: ParameterDecomposition, *arguments: Any) -> Any:
        if self.global_step == step:
            for number in numbers:
                signal.raise_signal(number)  # to this thread: two in a row stay two
        return original(self, *arguments)

    monkeypatch.setattr(ParameterDecomposition, "training_step", training_step)


def test_logging_and_evaluation_change_not_one_bit_of_the_weights(tiny: Tiny, tmp_path: Path):
    quiet = tiny("steps=8", *(f"logging.{which}=100" for which in ("log_every", "eval_every", "slow_eval_every")))
    quiet |= {"metric": {"fast": {}, "slow": {}}, "goal": {}}
    loud = tiny("steps=8", *(f"logging.{which}=1" for which in ("log_every", "eval_every", "checkpoint_every")))
    loud["logging"]["slow_eval_every"] = 2
    state = torch.get_rng_state()
    run(quiet, tmp_path / "quiet")
    run(loud, tmp_path / "loud")
    assert len(rows_of(tmp_path / "loud")) == 9 and len(rows_of(tmp_path / "quiet")) == 2
    assert tensors_of(tmp_path / "quiet") == tensors_of(tmp_path / "loud")
    assert torch.equal(state, torch.get_rng_state())


def test_the_order_of_the_losses_changes_no_term_of_a_step(tiny: Tiny, tmp_path: Path):
    config = tiny("steps=2", "logging.log_every=1")
    turned = {**config, "pd": {**config["pd"], "losses": dict(reversed(config["pd"]["losses"].items()))}}
    run(config, tmp_path / "one")
    run(turned, tmp_path / "other")
    one, other = rows_of(tmp_path / "one")[1], rows_of(tmp_path / "other")[1]
    terms = [name for name in one if name.startswith("loss/") and name != "loss/total"]
    assert len(terms) == 4 and all(one[name] == other[name] for name in terms)
    assert float(one["loss/total"]) == pytest.approx(float(other["loss/total"]), rel=1e-6)


def test_a_killed_run_is_resumed_bit_identically(tiny: Tiny, tmp_path: Path, uninterrupted: Path):
    config, folder = tiny(*LONG), tmp_path / "run"
    program = f"""
import json, os, signal, sys
from pdlightning.decomposition import ParameterDecomposition
from pdlightning.run import run
step = ParameterDecomposition.training_step
def killed(self, *arguments):
    if self.global_step == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)
ParameterDecomposition.training_step = killed
from pathlib import Path
run(json.loads(sys.argv[1]), Path(sys.argv[2]))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, json.dumps(config), str(folder)], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in checkpoints_by_step(folder / "checkpoints")] == ["step=30.ckpt", "step=20.ckpt"]
    run(config, folder, resume=True)
    assert_same(folder, uninterrupted)


def test_ctrl_c_leaves_a_run_that_goes_on_bit_identically(
    tiny: Tiny, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
):
    config, folder = tiny(*LONG), tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        signal_at(patched, KILLED_AT, signal.SIGINT)
        with pytest.raises(
            Interrupted, match=rf"after step 38 of 50. Go on with:\n  python -m pdlightning resume={folder}"
        ):
            run(config, folder)
    assert signal.getsignal(signal.SIGINT) is before
    assert (folder / "checkpoints" / "step=38.ckpt").exists() and not (folder / "summary.json").exists()
    run(config, folder, resume=True)
    assert_same(folder, uninterrupted)


def test_ctrl_c_twice_ends_the_run_within_the_step(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A shell starts its background jobs with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    signal_at(monkeypatch, 4, signal.SIGINT, signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            run(tiny(), tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in checkpoints_by_step(tmp_path / "run" / "checkpoints")] == ["step=3.ckpt"]


def test_ctrl_c_before_the_first_step_says_that_there_is_nothing_to_go_on_with(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    warmup = ParameterDecomposition.on_train_start

    def interrupted(self: ParameterDecomposition) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        warmup(self)

    monkeypatch.setattr(ParameterDecomposition, "on_train_start", interrupted)
    with pytest.raises(Interrupted, match="before the first step, .*start the run again"):
        run(tiny(), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_interruption_between_two_steps_is_obeyed_after_the_next_with_a_checkpoint(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder, start = tiny(), tmp_path / "run", ParameterDecomposition.on_train_batch_start

    def between(self: ParameterDecomposition, *batch: Any) -> None:  # callbacks have looked at the end of the step
        start(self, *batch)
        if self.global_step == 3:
            callback = next(c for c in self.trainer.callbacks if isinstance(c, RunCheckpoint))
            callback.saved, callback.interrupted = 0, True
            callback.on_train_batch_start(self.trainer)

    monkeypatch.setattr(ParameterDecomposition, "on_train_batch_start", between)
    with pytest.raises(Interrupted, match="Stopped after step 4"):
        run(config, folder)
    assert (folder / "checkpoints" / "step=4.ckpt").exists()


def test_a_run_that_died_between_its_last_step_and_its_export_is_completed(
    tiny: Tiny, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("pdlightning.run.export_decomposition", lambda *_, **__: sys.exit("dead"))
        with pytest.raises(SystemExit, match="dead"):
            run(tiny(), folder)
    assert not (folder / "summary.json").exists()
    run(tiny(), folder, resume=True)
    assert_same(folder, finished)
