"""The progress bar: step, total loss, ci-L0, steps/s."""

from __future__ import annotations

import sys
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class StepProgress(ProgressBar):
    """One bar for the whole training, redrawn when the training logs: an ordinary step costs it nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.bar: tqdm[Any] | None = None

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled and trainer.is_global_zero:
            self.bar = tqdm(
                total=trainer.max_steps, initial=trainer.global_step, unit="step", dynamic_ncols=True, file=sys.stderr
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if self.bar is None or (step % trainer.log_every_n_steps and step != trainer.max_steps):
            return
        shown = trainer.callback_metrics
        words = {"loss": "loss/total", "ci-L0": "train/ci_l0"}
        self.bar.set_postfix({word: f"{shown[key].item():.4g}" for word, key in words.items() if key in shown}, refresh=False)
        self.bar.update(step - self.bar.n)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
