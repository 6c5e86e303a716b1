"""What one step (or one evaluation batch) has seen: the one object every loss and metric receives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pdlightning.functional.random import KeyedRandom
from pdlightning.modules.ci import CausalImportances
from pdlightning.modules.component_model import ComponentModel, Run


@dataclass(eq=False)
class Observation:
    """The clean run of a batch, its causal importances, and the randomness of its positions.

    `leading` is the shape of the positions; every ci and mask is `[*leading, C]`.
    """

    model: ComponentModel
    batch: Any
    clean: Run
    ci: CausalImportances
    random: KeyedRandom
    training: bool

    @property
    def sites(self) -> list[str]:
        return list(self.ci.logits)

    @property
    def leading(self) -> tuple[int, ...]:
        return tuple(next(iter(self.ci.logits.values())).shape[:-1])

    @property
    def leading_size(self) -> int:
        """The number of positions N."""
        return math.prod(self.leading)

    @cached_property
    def noisy_lower(self) -> dict[str, Tensor]:
        """The lower ci that binomial sources interpolate (spec I3)."""
        return self.model.noisy_lower(self.ci, self.random)


def observe(
    model: ComponentModel,
    batch: Any,
    *,
    seed: int,
    step: Tensor,
    training: bool,
    outputs: bool = False,
    samples: Tensor | None = None,
    distinct: int | None = None,
) -> Observation:
    """Clean forward, ci, and the keys of this step (spec 6, parts 3 and 4).

    `step` is an int32 scalar tensor, negative for evaluation batches; `samples` the global index of every sample,
    int32 `[batch]`, by default 0, 1, 2, ...; `outputs` whether some loss asks for the sites' clean outputs; `distinct`
    how many samples come before the copies of the last of them.
    """
    clean = model.clean(batch, outputs=outputs)
    if samples is not None and any(len(x) != len(samples) for x in clean.inputs.values()):
        distinct = None  # somewhere a row is not a sample
    ci = model.causal_importances(clean, distinct=distinct)
    leading = next(iter(ci.logits.values())).shape[:-1]
    if not leading:
        raise ValueError(
            f"A batch needs a leading axis of samples, but the input of site {next(iter(ci.logits))!r} has the shape of"
            " one sample. Does the loader give batches?"
        )
    if samples is None:
        samples = torch.arange(leading[0], dtype=torch.int32, device=clean.output.device)
    random = KeyedRandom.at(seed=seed, step=step, samples=samples, inner=tuple(leading[1:]))
    return Observation(model, batch, clean, ci, random, training)
