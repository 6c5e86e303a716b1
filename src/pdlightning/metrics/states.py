"""Metrics whose states keep their precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor
from torchmetrics import Metric


class FullPrecisionMetric(Metric):
    """Moves to another device, never to another dtype: sums, schedules and sources do not bear rounding to bfloat16."""

    full_state_update = False  # True would measure, and attack, twice in every forward

    def _apply(self, fn: Callable[[Tensor], Tensor], *arguments: Any, **keywords: Any) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        return super()._apply(moved, *arguments, **keywords)  # type: ignore[return-value]
