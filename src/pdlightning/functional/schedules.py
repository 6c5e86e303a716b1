"""Schedules of learning rates, coefficients and exponents (spec S1)."""

from __future__ import annotations

import math
from typing import Literal

ScheduleKind = Literal["constant", "linear", "cosine"]


def schedule_value(
    step: int, steps: int, start: float, kind: ScheduleKind, warmup_frac: float = 0.0, final_frac: float = 1.0
) -> float:
    """Linear warmup over int(steps * warmup_frac) steps, then `kind` from `start` to `final_frac * start` (spec S1).

    The first step after the warmup is exactly `start`, the last step (`steps - 1`) exactly `final_frac * start`;
    cosine is half a period.
    """
    if kind not in ("constant", "linear", "cosine"):
        raise ValueError(f"Unknown schedule {kind!r}: expected constant, linear or cosine.")
    warmup = int(steps * warmup_frac)
    if step < warmup:
        return start * step / warmup
    if kind == "constant":
        return start
    final = start * final_frac
    t = min((step - warmup) / max(steps - 1 - warmup, 1), 1.0)
    remaining = 1 - t if kind == "linear" else 0.5 * (1 + math.cos(math.pi * t))
    return final + (start - final) * remaining


def interpolated_value(step: int, steps: int, start: float, end: float, start_frac: float, end_frac: float) -> float:
    """`start` until `start_frac` of training, `end` from `end_frac` on, linear between them: the p of spec L3."""
    t = step / max(steps - 1, 1)
    if t <= start_frac:
        return start
    if t >= end_frac:
        return end
    return start + (end - start) * (t - start_frac) / (end_frac - start_frac)
