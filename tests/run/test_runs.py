"""What a run leaves behind, what comes back from it, and what happens when its files are harmed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from run.conftest import rows_of, summary_of

from pdlightning import load_run
from pdlightning.__main__ import main
from pdlightning.callbacks import RunCheckpoint
from pdlightning.checkpoints import CheckpointError, checkpoints_by_step
from pdlightning.config import ConfigError
from pdlightning.guards import NonFiniteError
from pdlightning.resume import unfinished_run
from pdlightning.run import run
from pdlightning.storage import StorageError

Tiny = Callable[..., dict[str, Any]]


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def unfinished(copied: Path) -> Path:
    """As if it had been killed after its last checkpoint but one."""
    (copied / "summary.json").unlink()
    (copied / "checkpoints" / "step=6.ckpt").unlink()
    return copied


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pdlightning", *words])
    main()


def test_the_folder_of_a_run_has_everything(finished: Path):
    uncommitted = {"code.diff"} if json.loads((finished / "environment.json").read_text())["git"]["dirty"] else set()
    assert {path.name for path in finished.iterdir()} == uncommitted | {
        "config.yaml", "environment.json", "metrics.csv", "figures", "checkpoints", "decomposition", "summary.json",
        "tensorboard", "report.html",
    }  # fmt: skip
    summary = summary_of(finished)
    expected = {"experiment", "steps", "seconds", "steps_per_second", "solved", "init_from", "target", "metrics",
                "name", "tags", "labels", "swept"}  # fmt: skip
    assert summary.keys() == expected
    assert (summary["experiment"], summary["steps"]) == ("tms_5-2", 6) and summary["steps_per_second"] > 0
    assert all(isinstance(value, int | float) for value in summary["metrics"].values())


def test_the_csv_has_training_and_evaluation_under_the_number_of_finished_steps(finished: Path):
    rows = rows_of(finished)
    assert rows.keys() == {0, 2, 3, 4, 6}
    trained = {step for step, row in rows.items() if "loss/total" in row and "lr/ci_fn" in row and "train/ci_l0" in row}
    evaluated = {step for step, row in rows.items() if "eval/loss/total" in row}
    slowly = {step for step, row in rows.items() if "eval/pgd_ladder/steps_2" in row}
    assert (trained, evaluated, slowly) == ({2, 4, 6}, {0, 3, 6}, {0, 6})
    summary = summary_of(finished)["metrics"]
    assert {name: float(value) for name, value in rows[6].items() if name.startswith("eval/")} == summary


def test_figures_are_png_files_and_in_tensorboard(finished: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = list((finished / "figures").glob("*.png"))
    assert len(files) >= 7 and all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert "figures/vectors" in events.Tags()["images"] and events.Images("figures/vectors")[-1].step == 6
    last = events.Scalars("eval/loss/total")[-1]
    assert last.step == 6 and last.value == pytest.approx(summary_of(finished)["metrics"]["eval/loss/total"])


def test_a_loaded_run_measures_again_what_was_logged_bit_for_bit(finished: Path):
    loaded = load_run(finished)
    assert loaded.step == 6 and loaded.summary == summary_of(finished) and not loaded.decomposition.training
    assert loaded.evaluate() == loaded.summary["metrics"]
    assert loaded.decomposition.components["linear1"].V.shape == (5, 6)
    assert repr(loaded) == f"LoadedRun(tms_5-2, step 6, linear1 C=6, linear2 C=6; {finished})"


def test_an_unfinished_run_is_loaded_from_its_newest_checkpoint(unfinished: Path):
    loaded = load_run(unfinished)
    assert loaded.step == 3 and loaded.summary == {}
    row = {name: float(value) for name, value in rows_of(unfinished)[3].items() if name.startswith("eval/")}
    measured = loaded.evaluate()
    assert row and row == {name: measured[name] for name in row}


def change_config(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["pd"]["sites"]["linear1"] = 7
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (change_config, r"config.yaml was changed after the run \(pd.sites.linear1\)"),
        (lambda f: (f / "config.yaml").write_text("a: [1"), "config.yaml is damaged"),
        (lambda f: (f / "config.yaml").write_text(""), "config.yaml is damaged: expected a mapping"),
        (lambda f: (f / "summary.json").write_text("{"), "summary.json is damaged"),
        (lambda f: (f / "decomposition" / "tensors.safetensors").unlink(), "tensors.safetensors is missing"),
        (lambda f: (f / "config.yaml").unlink(), "is not the folder of a run: it has no config.yaml"),
    ],
)
def test_a_harmed_run_is_refused_with_a_sentence(copied: Path, harm: Callable[[Path], None], message: str):
    harm(copied)
    with pytest.raises(StorageError, match=message):
        load_run(copied)


def test_all_checkpoints_of_a_run_can_be_kept_and_loaded(tmp_path: Path, tiny: Tiny):
    run(tiny("logging.checkpoint_every=1", "logging.checkpoints_kept=null"), tmp_path / "run")
    assert len(checkpoints_by_step(tmp_path / "run" / "checkpoints")) == 6
    start, end = (load_run(tmp_path / "run", step=step).decomposition.components["linear1"].V for step in (1, 6))
    assert not torch.equal(start, end)


@pytest.mark.parametrize("before", [1000.0, None])
def test_the_time_of_a_resumed_run_counts_what_went_before(unfinished: Path, tiny: Tiny, before: float | None):
    path = checkpoints_by_step(unfinished / "checkpoints")[0]
    content = torch.load(path, weights_only=True)
    assert 0 < content["seconds"] < 1000
    if before is None:  # a checkpoint of an earlier version
        del content["seconds"]
    else:
        content["seconds"] = before
    torch.save(content, path)
    summary = run(load_run(unfinished).config, unfinished, resume=True)
    assert (before or 0) < summary["seconds"] < (before or 0) + 300


def test_a_run_without_a_checkpoint_is_refused_with_a_sentence(unfinished: Path, tiny: Tiny):
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(CheckpointError, match="no complete checkpoint: looked for step=<number>.ckpt"):
        load_run(unfinished)
    with pytest.raises(CheckpointError, match="start again without resuming"):
        run(tiny(), unfinished, resume=True)


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_is_replaced(tmp_path: Path, tiny: Tiny, finished: Path):
    folder, config = tmp_path / "run", tiny()
    run(config, folder)
    whole = {path: path.read_bytes() for path in (folder / "decomposition").iterdir()}
    (folder / "summary.json").unlink()
    newest = folder / "checkpoints" / "step=6.ckpt"
    newest.write_bytes(newest.read_bytes()[:-300])
    with pytest.warns(UserWarning, match="step=6.ckpt: it is truncated.*falling back to the checkpoint before it"):
        run(config, folder, resume=True)
    assert (
        whole[folder / "decomposition" / "tensors.safetensors"]
        == (folder / "decomposition" / "tensors.safetensors").read_bytes()
    )
    assert [path.name for path in checkpoints_by_step(folder / "checkpoints")] == ["step=6.ckpt", "step=3.ckpt"]
    assert load_run(folder).step == 6


def test_a_full_disk_while_saving_ends_the_run_and_keeps_the_checkpoint_before(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
):
    original, folder = RunCheckpoint.save, tmp_path / "run"

    def save(self: RunCheckpoint, trainer: Any, pl_module: Any) -> None:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        if trainer.global_step >= 4:
            monkeypatch.setattr(os, "fsync", full)
        original(self, trainer, pl_module)

    with monkeypatch.context() as patched:
        patched.setattr(RunCheckpoint, "save", save)
        with pytest.raises(StorageError, match="was not written: .*No space left on device"):
            run(tiny("logging.checkpoint_every=2"), folder)
    monkeypatch.undo()
    assert [path.name for path in checkpoints_by_step(folder / "checkpoints")] == ["step=2.ckpt"]
    assert run(tiny("logging.checkpoint_every=2"), folder, resume=True)["steps"] == 6


def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_finite_state_is_kept(tmp_path: Path, tiny: Tiny):
    config = tiny("logging.checkpoint_every=100", "logging.eval_every=100", "logging.slow_eval_every=100")
    config["pd"]["components_optimizer"]["lr"] = {
        "_target_": "pdlightning.schedules.Anneal",
        "start": 1e-3,
        "end": 1e38,
    }
    with pytest.raises(NonFiniteError) as error:
        run(config, tmp_path / "run")
    kept = checkpoints_by_step(tmp_path / "run" / "checkpoints")
    assert len(kept) == 1 and str(kept[0]) in error.value.__notes__[0]
    state = torch.load(kept[0], weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_a_finished_run_says_so_when_it_is_resumed(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    before = (finished / "decomposition" / "tensors.safetensors").stat().st_mtime_ns
    command(monkeypatch, f"resume={finished}")
    said = capsys.readouterr().out
    assert "has finished, there is nothing to go on with. Its results:" in said and "tms_5-2: NOT solved" in said
    assert (finished / "decomposition" / "tensors.safetensors").stat().st_mtime_ns == before


def test_resume_on_the_command_line_goes_on_with_the_run(
    unfinished: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
):
    command(monkeypatch, f"resume={unfinished}")
    assert summary_of(unfinished)["metrics"] == summary_of(finished)["metrics"]


def test_auto_finds_the_unfinished_run_of_this_config_only(unfinished: Path, tiny: Tiny):
    config = yaml.safe_load((unfinished / "config.yaml").read_text())
    assert unfinished_run(config, unfinished.parent) == unfinished
    assert unfinished_run({**config, "logging": {}}, unfinished.parent) == unfinished
    assert unfinished_run({**config, "seed": 1}, unfinished.parent) is None
    for path in checkpoints_by_step(unfinished / "checkpoints"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="falling back"):
        assert unfinished_run(config, unfinished.parent) is None
    (unfinished / "summary.json").write_text(json.dumps({}))
    assert unfinished_run(config, unfinished.parent) is None


def test_a_new_run_never_overwrites_another(copied: Path, tiny: Tiny):
    with pytest.raises(ConfigError, match=f"already holds a run. Go on with it by resume={copied}"):
        run(tiny(), copied)
    assert summary_of(copied)["steps"] == 6


def test_two_processes_do_not_work_on_one_run(unfinished: Path, tiny: Tiny):
    with FileLock(unfinished / ".running"), pytest.raises(StorageError, match="belongs to a run that is going on"):
        run(tiny(), unfinished, resume=True)


def test_only_target_trains_the_target_and_writes_no_run(tmp_path, monkeypatch, caplog) -> None:
    import sys

    from pdlightning.__main__ import main

    monkeypatch.chdir(tmp_path)
    words = ["experiment=tms_5-2", "debug=fast", "only=target", f"cache_dir={tmp_path / 'cache'}"]
    monkeypatch.setattr(sys, "argv", ["pdlightning", *words])
    main()
    (folder,) = (path for path in (tmp_path / "cache" / "targets").iterdir() if path.is_dir())
    assert {"weights.safetensors", "target.json", "polygon.png"} <= {path.name for path in folder.iterdir()}
    assert str(folder) in caplog.text
    assert not list(tmp_path.glob("outputs/**/config.yaml"))
