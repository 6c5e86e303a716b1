"""What one step (or one evaluation batch) has seen: the one object every loss and metric receives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdlightning.functional.random import KeyedRandom
from pdlightning.modules.ci import CausalImportances
from pdlightning.modules.component_model import ComponentModel, Run
from pdlightning.ranks import n_ranks, rank


@dataclass(eq=False)
class Observation:
    """The clean run of a batch, its causal importances, and the randomness of its positions.

    `leading` is the shape of the positions; every ci and mask is `[*leading, C]`. `samples` are the global indices of
    the samples, int32 `[batch]`; `rows` their places in the batch as it came, None where they stand in order.
    """

    model: ComponentModel
    batch: Any
    clean: Run
    ci: CausalImportances
    random: KeyedRandom
    training: bool
    samples: Tensor
    rows: Tensor | None = None
    kept_noisy_lower: dict[str, Tensor] | None = None

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

    @property
    def samples_in_order(self) -> Tensor:
        """The global indices of the samples as the batch came."""
        return (
            self.samples
            if self.rows is None
            else torch.empty_like(self.samples).index_copy_(0, self.rows, self.samples)
        )

    def random_of(self, samples: Tensor) -> KeyedRandom:
        """One draw for each sample, for all its positions."""
        return KeyedRandom.at(seed=self.random.seed, step=self.random.step, samples=samples)

    @property
    def noisy_lower(self) -> dict[str, Tensor]:
        """The lower ci that binomial sources interpolate (spec I3), drawn once."""
        if self.kept_noisy_lower is None:
            if self.training and not any(x.requires_grad for x in self.ci.logits.values()):
                raise RuntimeError("The noisy lower ci would have no gradient: call observe with noisy=True.")
            with torch.set_grad_enabled(self.training):  # a term that is only measured may be the first to ask
                self.kept_noisy_lower = self.model.noisy_lower(self.ci, self.random)
        return self.kept_noisy_lower


def observe(
    model: ComponentModel,
    batch: Any,
    *,
    seed: int,
    step: Tensor,
    training: bool,
    outputs: bool = False,
    noisy: bool = True,
    samples: Tensor | None = None,
    rows: Tensor | None = None,
    part: Tensor | None = None,
    distinct: int | None = None,
) -> Observation:
    """Clean forward, ci, and the keys of this step (spec 6, parts 3 and 4).

    `step` is an int32 scalar tensor, negative for evaluation batches; `samples` the global index of every sample,
    int32 `[batch]`, by default 0, 1, 2, ... in the batch as it came, behind those of the ranks before; `rows` their
    places in it, `[batch]`, where they have been put in another order; `part` the number of this part of the global
    batch, an int32 scalar tensor, None for the whole; `outputs` whether some loss asks for the sites' clean outputs,
    `noisy` whether one may train on the noisy lower ci; `distinct` how many samples come before the copies of the last.
    """
    clean = model.clean(batch, outputs=outputs)
    if rows is not None and any(len(x) != len(rows) for x in clean.inputs.values()):
        rows = distinct = None  # the target has made other rows of the samples
    ci = model.causal_importances(clean, distinct=distinct)
    if not noisy:  # no gradient will come by the logits; between the parts of a compiled step it would be one of zeros
        ci.logits = {site: logits.detach() for site, logits in ci.logits.items()}
    leading = next(iter(ci.logits.values())).shape[:-1]
    if not leading:
        raise ValueError(
            f"A batch needs a leading axis of samples, but the input of site {next(iter(ci.logits))!r} has the shape of"
            " one sample. Does the loader give batches?"
        )
    if samples is None:
        in_order = rows is None
        samples = torch.arange(leading[0], dtype=torch.int32, device=clean.output.device) if in_order else rows.int()
        if n_ranks() > 1:
            samples = samples + rank() * leading[0]
        samples = samples if part is None else samples + part * (n_ranks() * leading[0])
    random = KeyedRandom.at(seed=seed, step=step, samples=samples, inner=tuple(leading[1:]))
    return Observation(model, batch, clean, ci, random, training, samples, rows)
