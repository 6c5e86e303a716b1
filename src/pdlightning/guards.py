"""Stops a run at the first value that is not finite, and says where it came from (spec S3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pdlightning.functional.losses import Pair
from pdlightning.modules.component_model import ComponentModel
from pdlightning.ranks import on_any_rank


class NonFiniteError(RuntimeError):
    """A loss or a causal importance is not finite; the step it belongs to was not taken."""


class FiniteGuard:
    """Checks one step of a component model. The look costs one number; the search begins only when it is wrong.

    All ranks look at the same time, and stop at the same step.
    """

    def __init__(self, model: ComponentModel):
        self.model = model

    def check(
        self, batch: Any, total: Tensor, pairs: dict[str, Pair], ci_lower: dict[str, Tensor], *, step: int
    ) -> None:
        fine = bool(torch.isfinite(total))
        if not on_any_rank(not fine, total.device):
            return
        if fine:
            raise NonFiniteError(f"At step {step} the total loss of another rank is not finite; see its message.")
        inputs = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        broken = [
            *(f"parameter {name}" for name, p in self.model.named_parameters() if not p.isfinite().all()),
            *(f"ci of site {site}" for site, ci in ci_lower.items() if not ci.isfinite().all()),
            *(f"term {name}" for name, (value, _) in pairs.items() if not value.isfinite()),
        ]
        if any(x.is_floating_point() and not x.isfinite().all() for x in inputs):
            broken.insert(0, "the batch itself")
        raise NonFiniteError(
            f"The total loss is {total.item()} at step {step}. Not finite: {'; '.join(broken)}."
            " Look at the data if the batch is named; otherwise lower the learning rate or the coefficient of the first"
            " term named, or clip its gradient."
        )
