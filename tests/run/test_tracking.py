"""What the trackers keep of a run, read back from the files they wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
import wandb_files
import yaml
from run.conftest import TINY, Config, rows_of, summary_of

from pdlightning import ParameterDecomposition
from pdlightning.run import run
from pdlightning.tracking import WandB, section, settings_of


@pytest.fixture(scope="module")
def offline(composed: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, with figures, that Weights & Biases has kept offline."""
    folder = tmp_path_factory.mktemp("offline") / "run"
    config = composed(*TINY, "logging=offline")
    drawn = ("mean_ci", "vectors")
    slow = config["metric"]["slow"]
    config["metric"]["slow"] = {k: v for k, v in slow.items() if ".figures." not in v["_target_"] or k in drawn}
    run(config, folder)
    return folder


def stored(folder: Path) -> list[wandb_files.StoredRun]:
    wandb.teardown()  # waits until everything is written
    return [wandb_files.read(path) for path in sorted((folder / "wandb").glob("offline-run-*"))]


def test_every_setting_has_a_name_to_filter_by(offline: Path) -> None:
    (kept,) = stored(offline)
    settings = {name: value for name, value in kept.settings.items() if name != "_wandb"}
    assert settings == settings_of(yaml.safe_load((offline / "config.yaml").read_text()))
    assert settings["seed"] == 0 and settings["loss/stochastic_recon/coeff"] == 1.0
    assert not any(isinstance(value, dict) or "." in name for name, value in settings.items())


def test_all_charts_have_one_axis_and_the_numbers_of_metrics_csv(offline: Path) -> None:
    (kept,) = stored(offline)
    assert kept.axes["*"] == "step"
    steps = [row["step"] for row in kept.history]
    assert steps == sorted(steps) and steps[-1] == 6
    there = {(row["step"], name): value for row in kept.history for name, value in row.items()}
    rows = rows_of(offline)
    assert any(name.startswith("eval/") for row in rows.values() for name in row)
    for step, row in rows.items():
        for name, value in row.items():
            assert there[step, section(name)] == pytest.approx(float(value), nan_ok=True), name


def test_charts_are_in_sections_by_the_kind_of_metric() -> None:
    assert section("eval/ci_l0_0/total") == "eval_ci_l0_0/total"
    assert [section(name) for name in ("eval/mmcs", "loss/total", "lr/ci_fn")] == [
        "eval/mmcs",
        "loss/total",
        "lr/ci_fn",
    ]


def test_images_and_the_files_of_the_run_are_there_to_be_sent(offline: Path) -> None:
    (kept,) = stored(offline)
    images = {name for row in kept.history for name in row if name.startswith("figures/")}
    assert {"figures/vectors/path", "figures/mean_ci/linear/path"} <= images
    (files,) = (offline / "wandb").glob("offline-run-*/files")
    for row in kept.history:
        for name, value in row.items():
            if name.startswith("figures/") and name.endswith("/path"):
                assert (files / value).stat().st_size > 1000
    for name in ("summary.json", "metrics.csv", "decomposition/tensors.safetensors", "decomposition/metadata.json"):
        assert name in kept.files
        assert not (files / name).is_symlink() and (files / name).read_bytes() == (offline / name).read_bytes()
    assert kept.exit_code == 0
    assert kept.summary["solved"] is summary_of(offline)["solved"] is False


def test_every_job_of_a_sweep_is_a_run_of_its_own(tmp_path: Path, cache: Path) -> None:
    words = [
        "-m", "experiment=tms_5-2", "debug=fast", "metric=none", "~metric.slow.pgd_ladder", "data.batch_size=8",
        "logging=offline", f"cache_dir={cache}", "seed=1,2", "hydra.sweep.dir=sweep",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "pdlightning", *words], cwd=tmp_path, check=True)
    runs = [kept for job in sorted((tmp_path / "sweep").glob("*/wandb")) for kept in stored(job.parent)]
    assert [kept.settings["seed"] for kept in runs] == [1, 2]
    assert len({kept.id for kept in runs}) == 2
    assert [kept.exit_code for kept in runs] == [0, 0]
    assert [max(row["step"] for row in kept.history) for kept in runs] == [6, 6]


def test_a_run_that_goes_on_keeps_its_id(tmp_path: Path) -> None:
    ids = [WandB(save_dir=str(tmp_path), project="p").own_id() for _ in range(2)]
    assert ids[0] == ids[1] and WandB(save_dir=str(tmp_path / "other"), project="p").own_id() != ids[0]


def test_a_failing_run_is_marked_as_failed(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(ParameterDecomposition, "training_step", broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        run(tiny("logging=offline"), tmp_path / "run")
    (kept,) = stored(tmp_path / "run")
    assert kept.exit_code == 1 and "environment.json" in kept.files


def test_a_server_that_does_not_answer_leaves_an_offline_run(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = wandb.init, []

    def init(**arguments: Any) -> Any:
        asked.append(arguments["mode"])
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("no route to host")
        return real(**arguments)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.warns(UserWarning, match="does not answer.*no route to host.*kept offline in"):
        summary = run(tiny("logging=wandb", "logging.loggers.wandb.mode=online"), tmp_path / "run")
    assert asked == ["online", "offline"] and summary["steps"] == 6
    (kept,) = stored(tmp_path / "run")
    assert kept.exit_code == 0


def test_a_tracker_that_breaks_in_the_middle_is_said_once_and_the_run_goes_on(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log(self: Any, *arguments: Any) -> None:
        raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr(wandb.Run, "log", log)
    with pytest.warns(UserWarning, match="failed in log_metrics.*reset by peer.*goes on") as said:
        summary = run(tiny("logging=offline"), tmp_path / "run")
    assert wandb.run is None and summary["steps"] == 6 and (tmp_path / "run" / "decomposition").is_dir()
    assert len([warning for warning in said if "goes on" in str(warning.message)]) == 1


def test_without_a_key_the_run_is_kept_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert not WandB(save_dir=str(tmp_path), project="p").online()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert WandB(save_dir=str(tmp_path), project="p").online()
    assert not WandB(save_dir=str(tmp_path), project="p", mode="offline").online()


def test_tensorboard_keeps_numbers_images_and_settings(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    rows = rows_of(finished)
    for name in ("loss/total", "eval/loss/total", "lr/components"):
        found = {event.step: event.value for event in events.Scalars(name)}
        expected = {step: float(row[name]) for step, row in rows.items() if name in row}
        assert found == pytest.approx(expected, rel=1e-6)
    assert "figures/vectors" in events.Tags()["images"]
    assert events.Images("figures/vectors")[-1].step == 6
    plugins = {name for name in events.summary_metadata if name.startswith("_hparams_")}
    assert plugins == {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"}
    goals = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"] if name.startswith("goal/")}
    metrics = summary_of(finished)["metrics"]
    assert "goal/eval/match_linear1/mmcs" in goals
    assert goals == pytest.approx({name: metrics[name.removeprefix("goal/")] for name in goals})


@pytest.mark.slow
def test_a_network_that_is_not_there_never_ends_a_run(tmp_path: Path, cache: Path) -> None:
    """Half a minute: so long the server is asked."""
    environment = os.environ | {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    environment.pop("WANDB_MODE", None)
    words = ["experiment=tms_5-2", "debug=fast", "data.batch_size=8", "logging=wandb", f"cache_dir={cache}"]
    command = [sys.executable, "-m", "pdlightning", *words, "hydra.run.dir=here"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "does not answer" in done.stderr + done.stdout
    (kept,) = stored(tmp_path / "here")
    assert kept.exit_code == 0
