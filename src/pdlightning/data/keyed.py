"""Batches by key (spec D2): made where they are used, never stored, never drawn from a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from lightning import LightningDataModule
from torch import Tensor

from pdlightning.functional.random import KeyedRandom

Stream = Literal["train", "eval"]
Batch = Tensor | tuple[Tensor, Tensor]
TOGETHER = 16
"""Training batches that are drawn at once on a GPU, where one of a toy costs the starts of its 79 kernels alone."""


@dataclass(frozen=True)
class EndlessBatches:
    """Iterates over the batches of `start()` and all later steps; `start` is asked anew by every iteration.

    `batches` makes those of a step and of as many after it as it likes.
    """

    batches: Callable[[int], Sequence[Batch]]
    start: Callable[[], int]

    def __iter__(self) -> Iterator[Batch]:
        step = self.start()
        while True:
            batches = self.batches(step)
            yield from batches
            step += len(batches)


@dataclass(frozen=True)
class FixedBatches:
    """Iterates over `batch(0), ..., batch(length - 1)`: the same every time."""

    batch: Callable[[int], Batch]
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, range(self.length))


class KeyedDataModule(LightningDataModule):
    """Base of all data: a subclass draws the samples of one batch in `draw`, or looks them up in its own `batch`.

    Args:
        batch_size: samples in one step over all ranks together; rank r of n makes the r-th n-th of them itself.
        eval_batches: number of batches of the "eval" stream in one evaluation.
        seed: key of every draw.

    Inside a Trainer, batches are made on its device and the train loader starts at its step, so that a resumed run
    goes on where it stopped. Outside, they are made on the CPU from step 0. On a GPU `draw` makes the rows of several
    training steps at once.
    """

    def __init__(self, *, batch_size: int, eval_batches: int, seed: int) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batches", eval_batches)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.batch_size = batch_size
        self.eval_batches = eval_batches
        self.seed = seed

    def draw(self, random: KeyedRandom, stream: Stream) -> Batch:
        """The samples at the positions of `random`, one row each."""
        raise NotImplementedError(f"{type(self).__name__} must define draw, or batch.")

    def own_samples(self) -> range:
        """This rank's samples of the global batch.

        Raises:
            ValueError: if the batch cannot be split evenly over the ranks.
        """
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        if self.batch_size % ranks:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split evenly over {ranks} ranks: choose a multiple of {ranks}."
            )
        rows = self.batch_size // ranks
        return range(rank * rows, (rank + 1) * rows)

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def batch(self, step: int, stream: Stream = "train") -> Batch:
        """This rank's samples of the batch at `step` of a stream, a pure function of its arguments and the seed."""
        own, device = self.own_samples(), self.device
        samples = torch.arange(own.start, own.stop, dtype=torch.int32, device=device)
        # A fill, unlike torch.tensor, does not make an accelerator wait for the host.
        at = torch.full((), step, dtype=torch.int32, device=device)
        return self.draw(KeyedRandom.at(seed=self.seed, step=at, samples=samples), stream)

    def batches(self, steps: range) -> list[Batch]:
        """`batch(step)` of consecutive training steps, in one draw."""
        own, device = self.own_samples(), self.device
        samples = torch.arange(own.start, own.stop, dtype=torch.int32, device=device).repeat(len(steps))
        at = torch.arange(steps.start, steps.stop, dtype=torch.int32, device=device)
        at = at.unsqueeze(-1).expand(-1, len(own)).flatten()
        rows = self.draw(KeyedRandom.at(seed=self.seed, step=at, samples=samples), "train")
        parts = [x.split(len(own)) for x in (rows if isinstance(rows, tuple) else (rows,))]
        return [one if isinstance(rows, tuple) else one[0] for one in zip(*parts, strict=True)]

    def batches_from(self, step: int) -> list[Batch]:
        """The training batch of this step, and where it is cheaper together those after it."""
        looked_up = type(self).batch is not KeyedDataModule.batch
        if looked_up or self.device.type == "cpu":
            return [self.batch(step)]
        return self.batches(range(step, step + TOGETHER))

    def train_dataloader(self) -> Iterable[Batch]:
        return EndlessBatches(self.batches_from, self.first_step)

    def val_dataloader(self) -> FixedBatches:
        return FixedBatches(lambda step: self.batch(step, "eval"), self.eval_batches)

    def first_step(self) -> int:
        """Batches consumed so far by the attached trainer, 0 without one."""
        return 0 if self.trainer is None else self.trainer.global_step * self.trainer.accumulate_grad_batches
