"""How far the training is: step, total loss, ci-L0, steps per second."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

LINES = 20  # at most about so many, where nobody watches


class StepProgress(ProgressBar):
    """One bar for the whole training, redrawn when the training logs: an ordinary step costs it nothing.

    Where stderr is no terminal, a line at about every twentieth of the training takes its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.bar: tqdm[Any] | None = None
        self.last_line = (0.0, 0)
        self.next_line = 0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_line = (time.perf_counter(), trainer.global_step)
        if self.enabled and sys.stderr.isatty():
            self.bar = tqdm(
                total=trainer.max_steps, initial=trainer.global_step, unit="step", dynamic_ncols=True, file=sys.stderr
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        last = step == trainer.max_steps
        if not self.enabled or (step % trainer.log_every_n_steps and not last):  # type: ignore[attr-defined]
            return
        shown = trainer.callback_metrics
        names = {"loss": "loss/total", "ci-L0": "train/ci_l0"}
        words = {word: f"{shown[name].item():.4g}" for word, name in names.items() if name in shown}
        if self.bar is not None:
            self.bar.set_postfix(words, refresh=False)
            self.bar.update(step - self.bar.n)
        elif last or step >= self.next_line:
            self.next_line = step + trainer.max_steps // LINES
            self.write_line(step, trainer.max_steps, words)

    def write_line(self, step: int, steps: int, words: dict[str, str]) -> None:
        (began, first), now = self.last_line, time.perf_counter()
        rate = (step - first) / (now - began)  # since the last line: the first one pays for an evaluation
        self.last_line = (now, step)
        said = "  ".join(f"{word} {value}" for word, value in words.items())
        print(f"step {step:>{len(str(steps))}} of {steps}  {said}  {rate:.3g} steps/s", file=sys.stderr, flush=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
