"""PGD reconstruction at rising strength (spec E5)."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pdlightning.masking import PGD, Masks
from pdlightning.masking.routing import Route
from pdlightning.metrics.comparisons import Comparison
from pdlightning.metrics.evaluation import Evaluation, Results
from pdlightning.metrics.reconstruction import compare_masked
from pdlightning.modules.component_model import ComponentModel
from pdlightning.observation import Observation


class PGDLadder(Evaluation):
    """The reconstruction loss after each number of ascents in `rungs`, all on one trajectory of a shared source.

    Args:
        rungs: numbers of ascents; the published ladder is 20, 40, ..., 1280.
        step_size: of one ascent.
        comparison: how the output is compared.
    """

    total: Tensor
    count: Tensor

    def __init__(self, *, rungs: list[int], step_size: float, comparison: Comparison, **metric_arguments: Any):
        super().__init__(**metric_arguments)
        if not rungs or sorted(set(rungs)) != list(rungs) or rungs[0] < 1:
            raise ValueError(f"PGDLadder(rungs): expected rising numbers of ascents from 1 on, got {rungs}.")
        self.rungs = list(rungs)
        self.comparison, self.needs_outputs = comparison, comparison.needs_outputs
        self.source = PGD(n_steps=rungs[-1], step_size=step_size, init="random", scope="shared")
        self.add_state("total", torch.zeros(len(rungs)), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def prepare(self, model: ComponentModel) -> None:
        self.comparison.prepare(model)

    def check(self, observation: Observation) -> None:
        self.comparison.check(observation)

    def update(self, observation: Observation) -> None:
        route = Route(observation.sites)

        def loss(masks: Masks) -> Tensor:
            value, n = compare_masked(observation, route, masks, self.comparison)
            return value / n

        count = 0
        climb = self.source.trajectory(observation, term=self.term, sites=route.sites, loss=loss)
        done = 0
        for i, rung in enumerate(self.rungs):
            masks = next(islice(climb, rung - done, None))
            done = rung + 1
            value, count = compare_masked(observation, route, masks, self.comparison)
            self.total[i] += value.detach()
        self.count += count

    def compute(self) -> Results:
        return {f"steps_{rung}": value for rung, value in zip(self.rungs, self.total / self.count, strict=True)}
