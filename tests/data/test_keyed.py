"""Batches that are drawn together are those that are drawn one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pdlightning.data import AbsoluteLabels, InductionTokens, SparseFeatures
from pdlightning.data.keyed import Batch, EndlessBatches, KeyedDataModule

SPARSE: dict[str, Any] = dict(
    n_features=6, batch_size=5, eval_batches=1, seed=3, value_range=(-1.0, 1.0), generation="at_least_zero",
    probability=0.4,
)  # fmt: skip
SOURCES = {
    "independent": lambda: SparseFeatures(**SPARSE),
    "labelled": lambda: SparseFeatures(**SPARSE, labels=AbsoluteLabels()),
    "synced": lambda: SparseFeatures(**SPARSE, synced=[[0, 4], [5, 2]]),
    "two": lambda: SparseFeatures(**SPARSE | {"generation": "exactly_two", "probability": None}),
    "induction": lambda: InductionTokens(
        vocab=9, length=8, prefix_window=3, batch_size=5, eval_batches=1, seed=3
    ),
}  # fmt: skip


def parts(batch: Batch) -> tuple[Tensor, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


@pytest.mark.parametrize("name", SOURCES)
def test_together_they_have_the_same_bits(name: str) -> None:
    data: KeyedDataModule = SOURCES[name]()
    together = data.batches(range(7, 11))
    assert len(together) == 4
    for step, batch in zip(range(7, 11), together, strict=True):
        alone = data.batch(step)
        assert type(alone) is type(batch) and len(parts(alone)) == len(parts(batch))
        for a, b in zip(parts(alone), parts(batch), strict=True):
            assert a.dtype == b.dtype and b.is_contiguous() and torch.equal(a, b)


def test_the_loader_gives_every_step_once_however_many_come_together() -> None:
    def some(step: int) -> Sequence[Tensor]:
        return [torch.tensor(step + i) for i in range(1 + step % 3)]

    found = [int(x) for _, x in zip(range(9), EndlessBatches(some, lambda: 5), strict=False)]  # type: ignore[arg-type]
    assert found == list(range(5, 14))


def test_on_the_cpu_each_batch_is_drawn_when_its_turn_comes() -> None:
    assert len(SOURCES["independent"]().batches_from(2)) == 1
