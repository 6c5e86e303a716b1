"""One forward of the target: what its sites do in it, and what is written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pdlightning.functional.kl import log_normalizer

if TYPE_CHECKING:
    from pdlightning.modules.site import Components


class Products:
    """x V and x W^T of one input of a site, each computed when first asked for and then kept.

    What was computed without gradient is computed again for whoever needs its gradient.
    """

    def __init__(self, components: Components, x: Tensor):
        self.components, self.x = components, x
        self.activation: Tensor | None = None
        self.target_product: Tensor | None = None

    def with_V(self) -> Float[Tensor, "*leading C"]:
        needs_grad = torch.is_grad_enabled() and self.components.V.requires_grad
        if self.activation is None or (needs_grad and not self.activation.requires_grad):
            self.activation = self.components.activation(self.x)
        return self.activation

    def with_weight(self) -> Float[Tensor, "*leading d_out"]:
        needs_grad = torch.is_grad_enabled() and self.x.requires_grad
        if self.target_product is None or (needs_grad and not self.target_product.requires_grad):
            self.target_product = self.components.target_product(self.x)
        return self.target_product


@dataclass(eq=False)
class Run:
    """What a forward of the target gave: its output and, where they were asked for, inputs and outputs of the sites.

    A clean run keeps the products of its inputs, for whoever needs them next, and with the outputs of the sites those
    of the target's blocks, so that a masked forward can start where its first mask is.
    """

    output: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    products: dict[str, Products]
    blocks: dict[str, Any]
    kept_normalizer: Tensor | None = None

    @property
    def log_normalizer(self) -> Float[Tensor, "*leading 1"]:
        """log sum exp of the logits that the output is, computed once for all KLs of a step."""
        if self.kept_normalizer is None:  # functools.cached_property holds a lock, which a compiler cannot trace
            self.kept_normalizer = log_normalizer(self.output)
        return self.kept_normalizer


@dataclass(eq=False)
class Pass:
    """What the sites do in one forward of the target, and what they write down.

    Sites named in `masks` run through their masked subcomponents, all others run the target's weight (spec C6).

    `clean` is the clean run of the same batch. Until the first masked site has run, everything is as in it: what
    enters that site is its clean input, whose products are there, and what comes before need not run again.
    """

    masks: dict[str, Float[Tensor, "*leading C"]] = field(default_factory=dict)
    delta_masks: dict[str, Float[Tensor, " *leading"]] | None = None
    routes: dict[str, Bool[Tensor, " *leading"]] | None = None
    inputs: dict[str, Tensor] | None = None
    outputs: dict[str, Tensor] | None = None
    blocks: dict[str, Any] | None = None
    clean: Run | None = None


class CurrentPass:
    """The pass that the sites of one model are in; None while the target runs as it always did.

    `edited` is what open interventions make of a site, (components, x) -> its output, None where they leave it alone.
    """

    def __init__(self) -> None:
        self.value: Pass | None = None
        self.edited: Callable[[Components, Tensor], Tensor | None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CurrentPass:
        """A copied model is in no pass, and nobody would end an intervention in it."""
        return CurrentPass()
