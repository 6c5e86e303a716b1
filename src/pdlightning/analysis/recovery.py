"""Training compute recovered: which share of a target's own training gives the cross-entropy of its decomposition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Curve = Sequence[Sequence[float]]
"""(step, validation loss) pairs of a training, in the order of the steps; the last is its end."""


class Recovered(NamedTuple):
    """`share` of the training steps, in [0, 1]; `at_most` where the curve begins below, so that it is only a bound."""

    share: float
    at_most: bool = False


def training_compute_recovered(curve: Curve, ce_difference: float) -> Recovered:
    """s / S, where s is the first step with L(s) = L(S) + (CE - CE_target), and S the last.

    L is the curve, straight between its points over log(step). The difference is taken, and not the CE itself,
    because the decomposition is evaluated on other text than the training was.
    """
    if not curve or any(step <= 0 for step, _ in curve):
        raise ValueError(f"A validation curve needs points at steps above 0, got {list(curve)!r:.100}.")
    if not math.isfinite(ce_difference):
        raise ValueError(f"The cross-entropy of a decomposition must be finite to be placed, got {ce_difference}.")
    last, end = curve[-1]
    level = end + ce_difference
    if level >= curve[0][1]:
        return Recovered(curve[0][0] / last, at_most=level > curve[0][1])
    for (step, loss), (next_step, next_loss) in zip(curve, curve[1:], strict=False):
        if next_loss <= level:
            part = (loss - level) / (loss - next_loss)
            return Recovered(math.exp(math.log(step) + part * math.log(next_step / step)) / last)
    return Recovered(1.0)
