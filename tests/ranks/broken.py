"""Data of which one rank, or every rank, goes wrong in the middle of a training: for tests of what happens then."""

from __future__ import annotations

import os
import signal
import time
from typing import Literal

from pdlightning.data import SparseFeatures
from pdlightning.data.keyed import Batch, Stream


class BrokenFeatures(SparseFeatures):
    """Sparse features; at step `at` of the training rank 1 is killed, or raises, or every step takes a while."""

    def __init__(
        self, *, how: Literal["killed", "raises", "slow"], at: int, n_features: int, batch_size: int, eval_batches: int
    ) -> None:
        super().__init__(
            n_features=n_features, batch_size=batch_size, eval_batches=eval_batches, seed=0,
            generation="at_least_zero", value_range=(0.0, 1.0), probability=0.3,
        )  # fmt: skip
        self.how, self.at = how, at

    def batch(self, step: int, stream: Stream = "train") -> Batch:
        if stream == "train" and self.trainer is not None and step >= self.at:
            if self.how == "slow":
                time.sleep(0.2)
            elif self.trainer.global_rank == 1 and self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.trainer.global_rank == 1:
                raise RuntimeError("the disk of rank 1 is on fire")
        return super().batch(step, stream)
