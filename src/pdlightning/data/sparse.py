"""Sparse feature vectors: each feature is active rarely and has a uniform value when it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pdlightning.data.keyed import Batch, KeyedDataModule, Stream
from pdlightning.functional.random import KeyedRandom

Generation = Literal["at_least_zero", "exactly_one", "exactly_two", "exactly_three", "exactly_four", "exactly_five"]
ACTIVE = {"exactly_one": 1, "exactly_two": 2, "exactly_three": 3, "exactly_four": 4, "exactly_five": 5}


class SparseFeatures(KeyedDataModule):
    """Vectors x with x_i ~ U[low, high) where feature i is active and exactly 0 elsewhere (spec 9).

    Args:
        n_features: length of x.
        batch_size: samples in one step over all ranks together.
        eval_batches: batches in one evaluation.
        seed: key of every draw.
        generation: `at_least_zero` makes each feature active with `probability`, independently;
            `exactly_k` makes a uniformly random k of the features active.
        value_range: (low, high).
        probability: chance of a feature to be active, for `at_least_zero` only.
        synced: disjoint groups of features that are active together (values stay independent), `at_least_zero` only.
        labels: maps x to labels; with it a batch is the pair (x, labels(x)), without it x alone.
    """

    def __init__(
        self,
        *,
        n_features: int,
        batch_size: int,
        eval_batches: int,
        seed: int,
        generation: Generation,
        value_range: tuple[float, float],
        probability: float | None = None,
        synced: Sequence[Sequence[int]] = (),
        labels: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batches=eval_batches, seed=seed)
        check_generation(generation, n_features, probability, synced)
        self.low, self.high = value_range
        if not self.low < self.high:
            raise ValueError(f"value_range must be (low, high) with low < high, got {(self.low, self.high)}.")
        self.n_features = n_features
        self.probability = probability
        self.n_active = None if generation == "at_least_zero" else ACTIVE[generation]
        self.labels = labels
        # Every feature is active with its leader: the first of its group, or itself.
        leader = torch.arange(n_features)
        for group in synced:
            leader[list(group)] = group[0]
        self.leader = leader if synced else None

    def draw(self, random: KeyedRandom, stream: Stream) -> Batch:
        chance, value = random.uniform(2 * self.n_features, "data", stream).chunk(2, dim=-1)
        x = torch.where(self.active(chance), self.low + (self.high - self.low) * value, 0.0)
        return x if self.labels is None else (x, self.labels(x))

    def active(self, chance: Float[Tensor, "batch n_features"]) -> Bool[Tensor, "batch n_features"]:
        """Which features are active, from one number in [0, 1) for each of them."""
        if self.n_active is not None:
            chosen = chance.topk(self.n_active, dim=-1).indices
            return torch.zeros_like(chance, dtype=torch.bool).scatter_(-1, chosen, True)
        if self.leader is not None:
            self.leader = self.leader.to(chance.device)  # once: a copy makes the host wait
            chance = chance[:, self.leader]
        assert self.probability is not None
        return chance < self.probability


def check_generation(
    generation: Generation, n_features: int, probability: float | None, synced: Sequence[Sequence[int]]
) -> None:
    """Raise ValueError unless the arguments of `SparseFeatures` fit together."""
    if n_features < 1:
        raise ValueError(f"n_features must be at least 1, got {n_features}.")
    if generation == "at_least_zero":
        if probability is None or not 0 <= probability <= 1:
            raise ValueError(f"generation 'at_least_zero' needs a probability in [0, 1], got {probability}.")
    elif generation not in ACTIVE:
        raise ValueError(f"generation must be at_least_zero or one of {', '.join(ACTIVE)}, got {generation!r}.")
    elif ACTIVE[generation] > n_features:
        raise ValueError(f"generation {generation!r} needs at least {ACTIVE[generation]} features, got {n_features}.")
    elif probability is not None or synced:
        raise ValueError(f"generation {generation!r} takes no probability and no synced groups: leave them out.")
    members = [feature for group in synced for feature in group]
    if any(not 0 <= feature < n_features for feature in members):
        raise ValueError(f"synced features must lie in 0..{n_features - 1}, got {[list(group) for group in synced]}.")
    if len(set(members)) != len(members) or any(len(group) < 2 for group in synced):
        raise ValueError(
            f"synced groups must be disjoint, of at least 2 features each, got {[list(group) for group in synced]}."
        )
