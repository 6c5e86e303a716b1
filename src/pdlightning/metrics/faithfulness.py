"""Faithfulness: the subcomponents of a site add up to its weight (spec L2)."""

from __future__ import annotations

from typing import Any, Literal

import torch

from pdlightning.functional.losses import Pair, faithfulness_loss, relative_faithfulness_loss
from pdlightning.metrics.loss import Loss
from pdlightning.modules.component_model import ComponentModel
from pdlightning.observation import Observation
from pdlightning.schedules import Value

Form = Literal["mean_squared", "relative"]


def faithfulness(model: ComponentModel, form: Form) -> torch.Tensor:
    """The value for a model, in fp32 even under autocast (spec L2)."""
    device_type = next(iter(model.components.values())).V.device.type
    with torch.autocast(device_type, enabled=False):
        deltas = {path: c.weight_delta for path, c in model.components.items()}
        if form == "mean_squared":
            return faithfulness_loss(deltas)
        return relative_faithfulness_loss(deltas, {path: c.target_weight for path, c in model.components.items()})


class FaithfulnessLoss(Loss):
    """`mean_squared`: sum_s ||D_s||^2 / sum_s numel(W_s); `relative`: mean_s ||D_s||^2 / ||W_s||^2 (spec L2)."""

    def __init__(self, *, coeff: Value, form: Form = "mean_squared", **metric_arguments: Any):
        super().__init__(coeff=coeff, **metric_arguments)
        if form not in ("mean_squared", "relative"):
            raise ValueError(f"FaithfulnessLoss(form): expected mean_squared or relative, got {form!r}.")
        self.form: Form = form

    def measure(self, observation: Observation) -> Pair:
        return faithfulness(observation.model, self.form), 1
