"""Stops a run at the first value that is not finite, and says where it came from (spec S3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pdlightning.functional.losses import Pair
from pdlightning.functional.squash import ALPHA
from pdlightning.modules.component_model import ComponentModel


class NonFiniteError(RuntimeError):
    """A loss or a causal importance left its range; the weights are still those of the step before."""


class FiniteGuard:
    """Checks one step of a component model. The look costs one number; the search begins only when it is wrong."""

    def __init__(self, model: ComponentModel):
        self.model = model

    def check(
        self, batch: Any, total: Tensor, pairs: dict[str, Pair], ci_lower: dict[str, Tensor], *, step: int
    ) -> None:
        if torch.isfinite(total):
            return
        inputs = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        broken = [
            *(f"parameter {name}" for name, p in self.model.named_parameters() if not p.isfinite().all()),
            *(f"ci of site {site}" for site, ci in ci_lower.items() if not _in_range(ci)),
            *(f"term {name}" for name, (value, _) in pairs.items() if not value.isfinite()),
        ]
        if any(x.is_floating_point() and not x.isfinite().all() for x in inputs):
            broken.insert(0, "the batch itself")
        raise NonFiniteError(
            f"The total loss is {total.item()} at step {step}. Not finite or out of range: {'; '.join(broken)}."
            " Look at the data if the batch is named; otherwise lower the learning rate or the coefficient of the first"
            " term named, or clip its gradient."
        )


def _in_range(ci: Tensor) -> bool:
    """In [0, 1] up to the leak; NaN is out of range."""
    return bool(((ci >= -ALPHA * ci.abs().max()) & (ci <= 1 + ALPHA * ci.abs().max())).all())
