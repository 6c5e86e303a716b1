"""The callbacks around a small decomposition, without configs."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pdlightning import ParameterDecomposition
from pdlightning.callbacks import Evaluate, RunCheckpoint, StepProgress
from pdlightning.checkpoints import AtomicCheckpointIO
from pdlightning.loggers import MetricsCSV
from pdlightning.metrics import CIL0, Evaluation, FaithfulnessLoss, ImportanceMinimalityLoss
from pdlightning.modules import SharedMLP
from pdlightning.schedules import Anneal
from pdlightning.storage import StorageError


def decomposition() -> ParameterDecomposition:
    target = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    return ParameterDecomposition(
        target=target.requires_grad_(False),
        sites={"0": 5, "2": 4},
        ci_fn=SharedMLP(hidden=[3]),
        losses={
            "faithfulness": FaithfulnessLoss(coeff=1.0),
            "importance": ImportanceMinimalityLoss(coeff=1e-3, p=Anneal(start=2.0, end=1.0)),
        },
    )


def batches(n: int) -> list[Tensor]:
    return [torch.linspace(0, 1, 12).reshape(3, 4) + i for i in range(n)]


class Steps(Evaluation):
    """Writes down at which steps it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[int] = []

    def update(self, observation: Any) -> None:
        pass

    def compute(self) -> dict[str, Tensor]:
        self.computed.append(self.module.global_step)
        return {"": torch.tensor(float(len(self.computed)))}


class Draws(Evaluation):
    draws = True

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def update(self, observation: Any) -> None:
        if self.where == "update":
            raise RuntimeError("broken")

    def compute(self) -> dict[str, Figure]:
        if self.where == "compute":
            raise RuntimeError("broken")
        figure = Figure()
        figure.suptitle("$\\frac{$" if self.where == "saving" else "fine")
        return {"": figure}


def fit(module: ParameterDecomposition, *callbacks: Any, steps: int = 7, log_every: int = 2, **trainer: Any) -> None:
    lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=list(callbacks),
        log_every_n_steps=log_every,
        enable_model_summary=False,
        inference_mode=False,
        plugins=[AtomicCheckpointIO()],
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **trainer},
    ).fit(module, train_dataloaders=DataLoader(batches(200), batch_size=None))


@pytest.mark.parametrize(("steps", "fast", "slow"), [(7, [0, 2, 4, 6, 7], [0, 4, 7]), (8, [0, 2, 4, 6, 8], [0, 4, 8])])
def test_evaluations_come_first_every_so_often_and_last_and_never_twice(steps: int, fast: list[int], slow: list[int]):
    module, metrics = decomposition(), {"fast": Steps(), "slow": Steps()}
    for metric in metrics.values():
        object.__setattr__(metric, "module", module)
    evaluate = Evaluate(
        metrics={"f": metrics["fast"]}, slow_metrics={"s": metrics["slow"]}, every=2, slow_every=4, batches=batches(2)
    )
    fit(module, evaluate, steps=steps)
    assert metrics["fast"].computed == fast and metrics["slow"].computed == slow
    assert evaluate.latest["eval/f"] == len(fast) and evaluate.latest["eval/s"] == len(slow)


def test_a_scheduled_loss_among_the_metrics_has_its_value_of_the_step():
    module = decomposition()
    penalty = ImportanceMinimalityLoss(coeff=0.0, p=Anneal(start=2.0, end=1.0))
    evaluate = Evaluate(metrics={"again": penalty}, slow_metrics={}, every=3, slow_every=3, batches=batches(2))
    fit(module, evaluate)
    assert evaluate.latest["eval/again"] == evaluate.latest["eval/loss/importance"] > 0
    assert evaluate.latest["eval/loss/total"] == pytest.approx(
        evaluate.latest["eval/loss/faithfulness"] + 1e-3 * evaluate.latest["eval/loss/importance"]
    )


@pytest.mark.parametrize("where", ["update", "compute", "saving"])
def test_a_broken_figure_is_reported_and_the_run_goes_on(where: str):
    saved: list[str] = []

    def save(name: str, figure: Figure, step: int) -> None:
        figure.savefig(io.BytesIO())
        saved.append(name)

    slow = {"broken": Draws(where), "fine": Draws("nowhere")}
    evaluate = Evaluate(
        metrics={"l0": CIL0(threshold=0.0)},
        slow_metrics=slow,
        every=7,
        slow_every=7,
        batches=batches(1),
        save_figure=save,
    )
    with pytest.warns(UserWarning, match="The figure '.*broken' failed and is skipped; the run goes on"):
        fit(decomposition(), evaluate)
    assert saved == ["eval/fine"] * 2 and "eval/l0/total" in evaluate.latest


def test_a_full_disk_under_a_figure_is_not_taken_for_a_broken_figure():
    def save(name: str, figure: Figure, step: int) -> None:
        raise StorageError("full")

    evaluate = Evaluate(
        metrics={}, slow_metrics={"fine": Draws("nowhere")}, every=7, slow_every=7, batches=batches(1), save_figure=save
    )
    with pytest.raises(StorageError, match="full"):
        fit(decomposition(), evaluate)


def test_a_metric_named_twice_or_a_slow_cadence_that_is_no_multiple_is_refused():
    with pytest.raises(ValueError, match="named twice, as fast and as slow: a"):
        Evaluate(metrics={"a": Steps()}, slow_metrics={"a": Steps()}, every=1, slow_every=1)
    with pytest.raises(ValueError, match="multiple of eval_every, got 5 and 2: 4 would fit"):
        Evaluate(metrics={}, slow_metrics={}, every=2, slow_every=5)


def test_checkpoints_keep_the_two_newest_and_the_rows_before_them_are_on_the_disk(tmp_path: Path):
    csv = MetricsCSV(path=tmp_path / "metrics.csv")
    checkpoint = RunCheckpoint(folder=tmp_path / "checkpoints", every=3, kept=2, config={"a": 1})
    seen: dict[str, list[str]] = {}

    class Look(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                seen["rows"] = (tmp_path / "metrics.csv").read_text().splitlines()
                seen["kept"] = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    fit(decomposition(), checkpoint, Look(), logger=csv, enable_checkpointing=True)
    assert [row.split(",")[0] for row in seen["rows"]] == ["step", "2", "4", "6"]
    assert seen["kept"] == ["step=3.ckpt", "step=6.ckpt"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step=6.ckpt", "step=7.ckpt"]
    content = AtomicCheckpointIO().load_checkpoint(tmp_path / "checkpoints" / "step=7.ckpt")
    assert content["pdlightning_config"] == {"a": 1}


def test_rows_after_the_step_a_run_goes_on_from_are_dropped(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text("step,a,b\n0,1.5,\n10,,2.5\n20,3.5,\n")
    csv = MetricsCSV(path=tmp_path / "metrics.csv", first_step=10)
    csv.log_metrics({"b": 0.1 + 0.2, "c": 1e-30}, step=20)
    csv.finalize("success")
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b,c\n0,1.5,,\n10,,2.5,\n20,,0.30000000000000004,1e-30\n"


def test_without_a_terminal_progress_is_a_few_lines(monkeypatch: pytest.MonkeyPatch):
    text = io.StringIO()
    monkeypatch.setattr(sys, "stderr", text)
    fit(decomposition(), StepProgress(), steps=200, log_every=1, enable_progress_bar=True)
    lines = [line for line in text.getvalue().splitlines() if line.startswith("step")]
    assert 10 < len(lines) < 25
    assert lines[-1].startswith("step 200 of 200  loss ") and "ci-L0" in lines[-1] and lines[-1].endswith("steps/s")
