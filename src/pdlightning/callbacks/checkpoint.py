"""Checkpoints to resume from, and a clean end on Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch.callbacks import Checkpoint

from pdlightning.checkpoints import checkpoint_step, checkpoints_by_step
from pdlightning.decomposition import ParameterDecomposition
from pdlightning.guards import NonFiniteError
from pdlightning.loggers import MetricsCSV
from pdlightning.ranks import gathered, n_ranks, on_any_rank, rank
from pdlightning.sharding import finite
from pdlightning.storage import StorageError

QUEUE_AGAIN = (signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(RuntimeError):
    """The training was stopped on purpose before its end; the message says how to go on."""


def queue_again(number: signal.Signals, handler: Any) -> None:
    """Let SLURM start this job again: as submitit does it, whose handler was there before ours, or by scontrol."""
    if callable(handler):
        handler(number, None)
    elif (job := os.environ.get("SLURM_JOB_ID")) is not None and rank() == 0:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        words = "was queued again" if done.returncode == 0 else f"could not be queued again: {done.stderr.strip()}"
        rank_zero_info(f"SLURM job {job} {words}")


class RunCheckpoint(Checkpoint):
    """Saves `step=N.ckpt` every so many steps, at the end, and when the training is interrupted or fails.

    Args:
        folder: where they go: the `checkpoints` of a run.
        every: steps between checkpoints.
        kept: the newest so many stay; None: all.
        config: the resolved config of the run as a plain dict, stored inside.
    """

    def __init__(self, *, folder: Path, every: int, kept: int | None, config: dict[str, Any]):
        if every < 1:
            raise ValueError(f"checkpoint_every must be >= 1, got {every}.")
        self.folder, self.every, self.kept, self.config = folder, every, kept, config
        self.started, self.before = time.perf_counter(), 0.0
        self.saved = -1
        self.interrupted = False
        self.asked_by: signal.Signals | None = None
        self.then: Any = None
        self.previous: dict[signal.Signals, Any] = {}

    @property
    def seconds(self) -> float:
        """Since this was made, and what the parts of the run before its checkpoint had taken."""
        return self.before + time.perf_counter() - self.started

    def on_save_checkpoint(  # type: ignore[override]
        self, trainer: Trainer, pl_module: ParameterDecomposition, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["pdlightning_config"] = self.config
        checkpoint["seconds"] = self.seconds
        # Losses are logged as means since the last log, which a resumed run must go on with.
        sums = {name: (loss.sum, loss.count) for name, loss in pl_module.terms.items()}
        checkpoint["loss_sums"] = {name: tuple(gathered(x[None], dim=0).sum(0) for x in s) for name, s in sums.items()}

    def on_load_checkpoint(  # type: ignore[override]
        self, trainer: Trainer, pl_module: ParameterDecomposition, checkpoint: dict[str, Any]
    ) -> None:
        self.before = checkpoint.get("seconds", 0.0)  # not in those of an earlier version
        if rank() > 0:  # the sums of all ranks go on with the first
            return
        for name, (total, count) in checkpoint["loss_sums"].items():
            loss = pl_module.terms[name]
            loss.sum, loss.count = total.to(loss.sum), count.to(loss.count)

    def save(self, trainer: Trainer, pl_module: ParameterDecomposition) -> None:
        """Write the state after the newest step, once; the rows of metrics.csv before it, so that none is lost."""
        step = trainer.global_step
        if step in (0, self.saved):  # at 0 there is nothing that the start of a run would not do again
            return
        broken = not all(finite(tensor) for tensor in pl_module.state_dict().values())
        if on_any_rank(broken, pl_module.device):
            return  # an earlier checkpoint is worth more, and the next look at the loss ends the run
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV) and trainer.is_global_zero:
                logger.write()
        trainer.save_checkpoint(self.folder / f"step={step}.ckpt")
        self.saved = step
        if trainer.is_global_zero and self.kept is not None:
            for old in checkpoints_by_step(self.folder)[self.kept :]:
                old.unlink()

    def on_train_start(self, trainer: Trainer, pl_module: ParameterDecomposition) -> None:  # type: ignore[override]
        """The first Ctrl-C (or SIGTERM) ends the training after the step it is in; the second ends it at once.

        SLURM sends SIGUSR1 or SIGUSR2 before the time of a job is up: that job is queued again.
        """
        self.saved, self.interrupted, self.asked_by = trainer.global_step, False, None
        if trainer.is_global_zero:
            self.remove_later_than(trainer.global_step)
        if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
            return
        self.previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, *QUEUE_AGAIN)}

        def stop(number: int, frame: FrameType | None) -> None:
            self.interrupted = True
            self.asked_by = signal.Signals(number)
            self.then = self.previous[self.asked_by]
            self.restore_signals()
            name = signal.Signals(number).name
            rank_zero_info(f"\n{name}: stopping after this step, with a checkpoint. Once more stops at once.")

        for number in self.previous:
            signal.signal(number, stop)

    def remove_later_than(self, step: int) -> None:
        """A run goes on from its newest complete checkpoint: a later one is damaged, and would crowd out good ones."""
        for path in checkpoints_by_step(self.folder):
            if checkpoint_step(path) > step:
                path.unlink()

    def restore_signals(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:  # type: ignore[override]
        if self.interrupted and n_ranks() == 1 and trainer.global_step == self.saved:  # during a warmup or evaluation
            self.end(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: ParameterDecomposition, *_: Any) -> None:  # type: ignore[override]
        last = trainer.global_step == trainer.max_steps
        # All ranks stop after the same step. On an accelerator the question makes the host wait.
        ask = n_ranks() == 1 or pl_module.device.type == "cpu" or trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        stopping = ask and on_any_rank(self.interrupted, pl_module.device)
        if stopping or last or trainer.global_step % self.every == 0:
            self.save(trainer, pl_module)
        if stopping and not last:
            self.end(trainer)

    def end(self, trainer: Trainer) -> None:
        """End the training where everything is saved."""
        if self.asked_by is not None and self.asked_by in QUEUE_AGAIN:
            queue_again(self.asked_by, self.then)
        if trainer.global_step == 0:
            raise Interrupted("Stopped before the first step, so there is nothing to go on with: start the run again.")
        raise Interrupted(
            f"Stopped after step {trainer.global_step} of {trainer.max_steps}. Go on with:\n"
            f"  python -m pdlightning resume={self.folder.parent}"
        )

    def on_train_end(self, trainer: Trainer, pl_module: ParameterDecomposition) -> None:  # type: ignore[override]
        self.restore_signals()
        self.save(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: ParameterDecomposition, exception: BaseException) -> None:  # type: ignore[override]
        """Keep the state of the last finished step, unless the disk is what failed."""
        self.restore_signals()
        alone = n_ranks() > 1 and not isinstance(exception, NonFiniteError)  # the other ranks know nothing of it
        known = isinstance(exception, (KeyboardInterrupt, StorageError, Interrupted))
        if trainer.training and not known and not alone:
            self.save(trainer, pl_module)
            if self.saved > 0:
                exception.add_note(f"The state after step {self.saved} is in {self.folder / f'step={self.saved}.ckpt'}")
