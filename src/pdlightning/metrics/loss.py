"""The base of all losses: a loss is a metric (design decision 2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pdlightning.functional.losses import Pair
from pdlightning.metrics.states import FullPrecisionMetric
from pdlightning.modules.component_model import ComponentModel
from pdlightning.observation import Observation
from pdlightning.schedules import Scheduled, Value


class Loss(FullPrecisionMetric):
    """A differentiable (sum, count) of an observation, accumulated as a metric; the value is sum / count (spec R4).

    Subclasses write `measure`. Training differentiates its result and hands it to `update`; evaluation calls `update`
    with an observation.

    Args:
        coeff: factor in the total loss, a number or a schedule; 0 means measured but not trained (spec L1).
    """

    is_differentiable = True
    needs_outputs = False
    sum: Tensor
    count: Tensor

    def __init__(self, *, coeff: Value, **metric_arguments: Any):
        super().__init__(**metric_arguments)
        if not callable(coeff) and not (isinstance(coeff, int | float) and math.isfinite(coeff) and coeff >= 0):
            raise ValueError(f"{type(self).__name__}(coeff): expected a number >= 0 or a schedule, got {coeff!r}.")
        self.coeff = Scheduled(coeff)
        self.term = type(self).__name__
        self.add_state("sum", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @property
    def trained(self) -> bool:
        return self.coeff.schedule is not None or bool(self.coeff.now != 0)

    def prepare(self, model: ComponentModel) -> None:
        """Called once with the model, before any observation: make the state that depends on its sites."""

    def check(self, observation: Observation) -> None:
        """Refuse, with a ValueError, what can be seen to be wrong before any training."""

    def check_batch(self, samples: int) -> None:
        """Refuse, with a ValueError, training batches of so many samples on each rank."""

    def check_training(self, *, micro_batches: int, loss_scaled: bool) -> None:
        """Refuse, with a ValueError, a training of accumulated micro-batches, or of a loss scaled for float16."""

    def warm_up(self, observation: Observation) -> None:
        """Called in a training step before any term is measured: persistent adversaries climb (spec 6 part 5)."""

    def after_backward(self) -> None:
        """Called after the backward of a step and before its update: adversaries climb (spec 6 part 8)."""

    def measure(self, observation: Observation) -> Pair:
        raise NotImplementedError(f"{type(self).__name__} must return (sum, count) from measure(observation).")

    def update(self, observation: Observation | Pair) -> None:
        total, count = observation if isinstance(observation, tuple) else self.measure(observation)
        self.sum += total.detach()
        self.count += count

    def compute(self) -> Tensor:
        return self.sum / self.count

    def set_progress(self, step: int, steps: int) -> None:
        """Bring every scheduled value to this step."""
        for module in self.modules():
            if isinstance(module, Scheduled):
                module.set(step, steps)
