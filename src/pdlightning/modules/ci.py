"""Causal importances: the squashings (spec I1) and the base of all ci functions (spec I2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pdlightning import functional as pf

Squash = Literal["leaky_hard", "sigmoid", "hard", "leaky", "swish_hard"]

SQUASHINGS: dict[Squash, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "leaky_hard": (pf.lower_leaky_hard_sigmoid, pf.upper_leaky_hard_sigmoid),
    "sigmoid": (torch.sigmoid, torch.sigmoid),
    "hard": (pf.hard_sigmoid, pf.hard_sigmoid),
    "leaky": (pf.leaky_hard_sigmoid, pf.leaky_hard_sigmoid),
    "swish_hard": (pf.swish_hard_sigmoid, pf.swish_hard_sigmoid),
}
"""name -> (lower, upper): lower feeds the masks, upper feeds the importance penalty only."""


@dataclass(eq=False)
class CausalImportances:
    """Per site, `[*leading, C]`: the logits of the ci function and their two squashings (spec I1)."""

    lower: dict[str, Tensor]
    upper: dict[str, Tensor]
    logits: dict[str, Tensor]

    @classmethod
    def from_logits(cls, logits: dict[str, Tensor], squash: Squash) -> CausalImportances:
        lower, upper = SQUASHINGS[squash]
        return cls(
            lower={s: lower(x) for s, x in logits.items()},
            upper={s: upper(x) for s, x in logits.items()},
            logits=logits,
        )


@dataclass(frozen=True)
class CIShape:
    """What a ci function must know of a site: the width of what it reads there, and C."""

    d_in: int
    C: int


class CIFunction(nn.Module):
    """Predicts ci logits from the target's own activations. Built for its sites by `build`, before that it is a recipe.

    `reads` says what it is given of each site: the site's "input" x, or its "component" activations x V. Embedding
    sites always give their component activations (spec I2).
    """

    reads: Literal["input", "component"] = "input"
    checkpoint_activations: bool = False
    """Whether it computes again what is large, in the backward; a compiled step then keeps less of its own, too."""

    def build(self, shapes: Mapping[str, CIShape], *, seed: int) -> None:
        """Make the parameters, drawn by the key (seed, name)."""
        raise NotImplementedError(f"{type(self).__name__} must make its parameters in build(shapes, seed=...).")

    def forward(self, inputs: dict[str, Float[Tensor, "*leading d"]]) -> dict[str, Float[Tensor, "*leading C"]]:
        raise NotImplementedError(f"{type(self).__name__} must return logits for every site in forward(inputs).")


def check_hidden(hidden: list[int], name: str) -> list[int]:
    if any(h < 1 for h in hidden):
        raise ValueError(f"{name}(hidden=...): every hidden width must be >= 1, got {list(hidden)}.")
    return list(hidden)


def initial_weight(*shape: int, fan_in: int, last: bool, seed: int, name: tuple[str, ...]) -> nn.Parameter:
    """Kaiming normal: gain sqrt(2) for hidden layers, gain 1 for the last (spec I2)."""
    gain = 1.0 if last else math.sqrt(2.0)
    draw = torch.randn(*shape, generator=pf.key_generator(seed, "ci_fn", *name), dtype=torch.float32)
    return nn.Parameter((draw * (gain / math.sqrt(fan_in))).to(torch.get_default_dtype()))


def site_key(path: str) -> str:
    """A site path as a module name: torch forbids dots there."""
    return path.replace(".", "/")
