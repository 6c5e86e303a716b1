"""Schedules as configuration: values that change over training (spec S1, L3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pdlightning.functional.schedules import ScheduleKind, interpolated_value, schedule_value


@runtime_checkable
class ScheduleLike(Protocol):
    """Anything that gives a value for a step of a training of `steps` steps."""

    def __call__(self, step: int, steps: int) -> float: ...


def check_fraction(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a fraction of training and must lie in [0, 1], got {value}.")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warmup from 0, then `kind` (cosine: half a period) from `start` to `final_frac * start` (spec S1)."""

    start: float
    kind: ScheduleKind = "constant"
    warmup_frac: float = 0.0
    final_frac: float = 1.0

    def __post_init__(self) -> None:
        check_fraction(self.warmup_frac, "Schedule(warmup_frac)")
        if not math.isfinite(self.start) or self.final_frac < 0:
            raise ValueError(f"Schedule: start must be finite and final_frac >= 0, got {self}.")
        schedule_value(0, 1, self.start, self.kind)

    def __call__(self, step: int, steps: int) -> float:
        return schedule_value(step, steps, self.start, self.kind, self.warmup_frac, self.final_frac)


@dataclass(frozen=True, kw_only=True)
class Anneal:
    """`start` until `start_frac` of training, `end` from `end_frac` on, linear or geometric between (spec L3)."""

    start: float
    end: float
    start_frac: float = 0.0
    end_frac: float = 1.0
    geometric: bool = False

    def __post_init__(self) -> None:
        check_fraction(self.start_frac, "Anneal(start_frac)")
        check_fraction(self.end_frac, "Anneal(end_frac)")
        if self.end_frac < self.start_frac:
            raise ValueError(f"Anneal: end_frac must not come before start_frac, got {self}.")
        if self.geometric and min(self.start, self.end) <= 0:
            raise ValueError(f"Anneal(geometric=True) needs start and end above 0, got {self}.")

    def __call__(self, step: int, steps: int) -> float:
        start, end = (math.log(self.start), math.log(self.end)) if self.geometric else (self.start, self.end)
        value = interpolated_value(step, steps, start, end, self.start_frac, self.end_frac)
        return math.exp(value) if self.geometric else value


Value = float | Schedule | Anneal


class Scheduled(nn.Module):
    """A number that may follow a schedule. `now` is a plain float while it is constant, else a 0-d buffer.

    The buffer is filled once a step, so that a compiled step sees a tensor and is not compiled anew for every value.
    `number` is the same as a float, for code that decides on the host.
    """

    now: Tensor | float
    number: float

    def __init__(self, value: float | ScheduleLike):
        super().__init__()
        self.schedule = value if callable(value) else None
        if callable(value):
            self.register_buffer("now", torch.tensor(float("nan")), persistent=False)
        else:
            self.now = float(value)
        self.number = float("nan") if callable(value) else self.now  # type: ignore[assignment]

    def set(self, step: int, steps: int) -> None:
        if self.schedule is not None:
            assert isinstance(self.now, Tensor)
            self.number = self.schedule(step, steps)
            self.now.fill_(self.number)

    def extra_repr(self) -> str:
        return f"{self.schedule or self.now}"
