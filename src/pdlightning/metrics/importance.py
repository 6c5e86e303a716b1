"""Importance minimality: few subcomponents at a time, and few often (spec L3)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pdlightning.functional.losses import Pair, frequency_weighted_sum, lp_penalty, smooth_l0_penalty
from pdlightning.metrics.loss import Loss
from pdlightning.modules.ci import site_key
from pdlightning.modules.component_model import ComponentModel
from pdlightning.observation import Observation
from pdlightning.ranks import n_ranks, sum_over_ranks
from pdlightning.schedules import Scheduled, Value


class FrequencyEMA(nn.Module):
    """Bias-corrected exponential moving average of f_c per site; the gradient passes through the newest part."""

    def __init__(self, *, halflife: float):
        super().__init__()
        self.decay = 0.5 ** (1 / halflife)

    def prepare(self, model: ComponentModel) -> None:
        for path, components in model.components.items():
            # One more entry than C: the weight that the average has gathered, for the bias correction.
            self.register_buffer(site_key(path), components.V.new_zeros(components.C + 1))

    def forward(self, site: str, frequency: Float[Tensor, " C"], *, update: bool) -> Float[Tensor, " C"]:
        past = self.get_buffer(site_key(site))
        average = self.decay * past[:-1] + (1 - self.decay) * frequency
        weight = self.decay * past[-1] + (1 - self.decay)
        if update:
            past.copy_(torch.cat([average.detach(), weight.reshape(1)]))
        return average / weight


class _ImportanceLoss(Loss):
    """sum_s sum_c [ f_c + beta * f_c * log2(1 + N f_c) ], f_c the mean of phi(upper) over all N positions (spec L3).

    Args:
        beta: weight of the frequency term.
        reference_count: takes the place of N inside the log.
        ema_halflife: half-life in steps of an exponential moving average of f_c that stands for f_c inside the log.
    """

    def __init__(
        self,
        *,
        coeff: Value,
        beta: float = 0.0,
        reference_count: int | None = None,
        ema_halflife: float | None = None,
        **metric_arguments: Any,
    ):
        super().__init__(coeff=coeff, **metric_arguments)
        if beta < 0 or (reference_count is not None and reference_count < 1):
            raise ValueError(f"beta must be >= 0 and reference_count >= 1, got {beta} and {reference_count}.")
        if ema_halflife is not None and ema_halflife <= 0:
            raise ValueError(f"ema_halflife is a number of steps above 0, got {ema_halflife}.")
        self.beta, self.reference_count = beta, reference_count
        self.ema = None if ema_halflife is None else FrequencyEMA(halflife=ema_halflife)

    def prepare(self, model: ComponentModel) -> None:
        if self.ema is not None:
            self.ema.prepare(model)

    def check_training(self, *, micro_batches: int, loss_scaled: bool) -> None:
        if micro_batches > 1 and self.beta:
            raise ValueError(
                f"beta={self.beta} bends the frequencies of the whole batch, and each of the {micro_batches} parts that"
                " are accumulated knows its own alone: take beta=0, or more ranks instead of runtime.accumulate."
            )

    def penalty(self, upper: Float[Tensor, "*leading C"]) -> Float[Tensor, "*leading C"]:
        raise NotImplementedError(f"{type(self).__name__} must return phi(upper).")

    def measure(self, observation: Observation) -> Pair:
        own, upper = observation.leading_size, observation.ci.upper
        positions = own * n_ranks()
        sums = [self.penalty(u).flatten(0, -2).sum(0) for u in upper.values()]
        if n_ranks() > 1:
            sums = sum_over_ranks(torch.cat(sums)).split([len(x) for x in sums])
        values = []
        for site, total in zip(upper, sums, strict=True):
            frequency = total / positions
            smooth = self.ema(site, frequency, update=observation.training) if self.ema else frequency
            values.append(
                frequency_weighted_sum(frequency, smooth, beta=self.beta, count=self.reference_count or positions)
            )
        # Counted by positions, so that batches of unequal size weigh as they should (spec R4).
        return torch.stack(values).sum() * own, own


class ImportanceMinimalityLoss(_ImportanceLoss):
    """phi(u) = (u + eps)^p; p a number, or annealed over training (spec L3 `lp`)."""

    def __init__(self, *, p: Value, eps: float = 1e-12, **arguments: Any):
        super().__init__(**arguments)
        self.p, self.eps = Scheduled(p), eps

    def prepare(self, model: ComponentModel) -> None:
        super().prepare(model)
        if model.squash == "leaky" and (self.p.schedule is not None or self.p.now != int(self.p.now)):
            raise ValueError(
                "squash='leaky' lets ci fall below 0, where u^p is not a number unless p is a whole number. Take a"
                " whole p, SmoothL0Loss, or another squash."
            )

    def penalty(self, upper: Float[Tensor, "*leading C"]) -> Float[Tensor, "*leading C"]:
        return lp_penalty(upper, self.p.now, self.eps)


class SmoothL0Loss(_ImportanceLoss):
    """phi(u) = u^2 / (u^2 + gamma^2), times (1 + gamma^2) when `normalised` (spec L3 `smooth_l0`)."""

    def __init__(self, *, gamma: Value, normalised: bool = False, **arguments: Any):
        super().__init__(**arguments)
        self.gamma, self.normalised = Scheduled(gamma), normalised

    def penalty(self, upper: Float[Tensor, "*leading C"]) -> Float[Tensor, "*leading C"]:
        return smooth_l0_penalty(upper, self.gamma.now, normalised=self.normalised)
