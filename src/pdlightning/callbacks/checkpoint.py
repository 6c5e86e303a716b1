"""Checkpoints to resume from, and a clean end on Ctrl-C."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

KEPT = 2  # the newest, and one more in case the newest is damaged


class RunCheckpoint(Checkpoint):
    """Saves `step=N.ckpt` every so many steps, at the end, and when the training is interrupted or fails.

    Args:
        folder: where they go.
        every: steps between checkpoints.
        config: the resolved config of the run as a plain dict, stored inside.
    """

    def __init__(self, *, folder: Path, every: int, config: dict[str, Any]):
        if every < 1:
            raise ValueError(f"checkpoint_every must be >= 1, got {every}.")
        self.folder, self.every, self.config = folder, every, config
        self.interrupted = False
        self.previous: dict[signal.Signals, Any] = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["pdlightning_config"] = self.config

    def save(self, trainer: Trainer) -> None:
        path = self.folder / f"step={trainer.global_step}.ckpt"
        if path.exists():
            return
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            newest_first = sorted(self.folder.glob("step=*.ckpt"), key=lambda p: -int(p.stem.removeprefix("step=")))
            for old in newest_first[KEPT:]:
                old.unlink()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first Ctrl-C (or SIGTERM) ends the training after the step it is in; the second ends it at once."""
        self.interrupted = False
        self.previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: FrameType | None) -> None:
            self.interrupted = trainer.should_stop = True
            self.restore_signals()
            rank_zero_info(f"Caught {signal.Signals(number).name}: stopping after this step, with a checkpoint.")

        for number in self.previous:
            signal.signal(number, stop)

    def restore_signals(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.interrupted or trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.restore_signals()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The state of the last finished step, which a failed or interrupted one has not changed."""
        self.restore_signals()
        if trainer.training and trainer.global_step > 0 and not isinstance(exception, KeyboardInterrupt):
            self.save(trainer)
