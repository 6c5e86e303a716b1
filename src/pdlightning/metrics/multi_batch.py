"""One adversary against several batches at once (spec L7)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pdlightning.functional.losses import Pair
from pdlightning.masking import PGD, Masks
from pdlightning.masking.pgd import Init
from pdlightning.masking.routing import Route
from pdlightning.metrics.comparisons import Comparison
from pdlightning.metrics.evaluation import Evaluation, Results
from pdlightning.metrics.reconstruction import compare_masked
from pdlightning.modules.component_model import ComponentModel
from pdlightning.observation import Observation, observe
from pdlightning.ranks import means_over_ranks


class MultiBatchPGD(Evaluation):
    """The reconstruction loss under one shared source that has climbed its gradient over several batches (spec L7).

    n_steps of r += step_size * sign(d value / d r), clamped to [0, 1], with value = sum / count over the batches, one
    vector r per site and one number for its delta, all sites routed. The inputs of the batches wait in host memory
    until `compute`, which runs each n_steps + 1 times with its clean forward and ci, one at a time on the device.

    Args:
        n_batches: the first so many evaluation batches are attacked (or all of them, where there are fewer).
        n_steps: ascents.
        step_size: of one ascent.
        comparison: how the output is compared.
        init: where the sources start; from ones there is nothing to climb: see `PGD`.
        delta: whether the weight deltas are attacked too.
    """

    def __init__(
        self,
        *,
        n_batches: int,
        n_steps: int,
        step_size: float,
        comparison: Comparison,
        init: Init = "random",
        delta: bool = True,
        **metric_arguments: Any,
    ):
        super().__init__(**metric_arguments)
        if n_batches < 1:
            raise ValueError(f"MultiBatchPGD: n_batches must be >= 1, got {n_batches}.")
        self.n_batches = n_batches
        self.source = PGD(n_steps=n_steps, step_size=step_size, init=init, scope="shared", delta=delta)
        self.comparison, self.needs_outputs = comparison, comparison.needs_outputs
        self.kept: list[tuple[Any, int, Tensor]] = []

    def prepare(self, model: ComponentModel) -> None:
        self.model = (model,)  # in a tuple, so that it is no part of the metric
        self.comparison.prepare(model)

    def check(self, observation: Observation) -> None:
        self.comparison.check(observation)

    def reset(self) -> None:
        super().reset()
        self.kept = []

    def update(self, observation: Observation) -> None:
        if len(self.kept) < self.n_batches:
            inputs = pytree.tree_map_only(Tensor, lambda x: x.detach().cpu(), observation.batch)
            self.kept.append((inputs, observation.random.seed, observation.random.step))

    def observations(self) -> Iterator[Observation]:
        (model,) = self.model
        device = next(model.parameters()).device
        for inputs, seed, step in self.kept:
            batch = pytree.tree_map_only(Tensor, lambda x: x.to(device), inputs)
            yield observe(model, batch, seed=seed, step=step, training=False, outputs=self.needs_outputs)

    def compute(self) -> Results:
        with torch.no_grad():
            first = next(self.observations())
            sources = self.source.start(first, term=self.term, sites=first.sites)
            for _ in range(self.source.n_steps):
                parts = [self.gradients(observation, sources) for observation in self.observations()]
                count = sum(n for _, n in parts)  # as many on every rank
                sums = [torch.stack(g).sum(0) / count for g in zip(*(g for g, _ in parts), strict=True)]
                sources = self.source.moved(sources, means_over_ranks(sums))
            pairs = [
                self.pair(observation, self.source.masks(observation, sources, detach_ci=True))
                for observation in self.observations()
            ]
        (mean,) = means_over_ranks([torch.stack([value for value, _ in pairs]).sum() / sum(n for _, n in pairs)])
        return {"": mean}

    def gradients(self, observation: Observation, sources: list[tuple[str, str, Tensor]]) -> tuple[list[Tensor], int]:
        """Of the sum over the elements or positions of one batch, and their number."""
        count = 0

        def loss(masks: Masks) -> Tensor:
            nonlocal count
            value, count = self.pair(observation, masks)
            return value

        return list(self.source.gradients(observation, sources, loss=loss)), count

    def pair(self, observation: Observation, masks: Masks) -> Pair:
        return compare_masked(observation, Route(observation.sites), masks, self.comparison)
