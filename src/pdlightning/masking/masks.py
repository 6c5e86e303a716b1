"""What a source makes: the masks of one masked forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from pdlightning.modules.component_model import ComponentModel
from pdlightning.observation import Observation


@dataclass(eq=False)
class Masks:
    """Per site `[*leading, C]`, and for the weight delta `[*leading]` or absent (spec C5)."""

    masks: dict[str, Float[Tensor, "*leading C"]]
    delta_masks: dict[str, Float[Tensor, " *leading"]] | None

    def detach(self) -> Masks:
        deltas = self.delta_masks
        return Masks(
            {s: mask.detach() for s, mask in self.masks.items()},
            None if deltas is None else {s: mask.detach() for s, mask in deltas.items()},
        )


TermValue = Callable[[str, Callable[[list[str]], Masks]], Tensor]
"""(key, sites -> masks) -> the value of a term whose routing is drawn under that key."""


class Source(nn.Module):
    """Fills what ci leaves open (spec R1).

    Called with the observation, the name of the term (the key of its draws), the sites that are masked, and `loss`,
    which tells an adversary the value that some masks would give. `adversarial` says whether it asks,
    `noisy` whether it interpolates the noisy lower ci (spec I3).
    """

    adversarial = False
    noisy = False

    def prepare(self, model: ComponentModel) -> None:
        """Called once with the model, before any observation."""

    def check_batch(self, samples: int) -> None:
        """Refuse, with a ValueError, training batches of so many samples on each rank."""

    def check_training(self, *, micro_batches: int, loss_scaled: bool) -> None:
        """Refuse, with a ValueError, a training of accumulated micro-batches, or of a loss scaled for float16."""

    def warm_up(self, observation: Observation, *, term: str, value: TermValue) -> None:
        """Called in a training step before any term is measured (spec 6 part 5)."""

    def after_backward(self, *, weight: float) -> None:
        """Called after the backward of a step and before its update; `weight` is what the term was multiplied with."""

    def forward(
        self, observation: Observation, *, term: str, sites: list[str], loss: Callable[[Masks], Tensor]
    ) -> Masks:
        raise NotImplementedError(
            f"{type(self).__name__} must make masks in forward(observation, term=, sites=, loss=)."
        )
