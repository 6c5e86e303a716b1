"""What a source makes: the masks of one masked forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from pdlightning.observation import Observation


@dataclass(eq=False)
class Masks:
    """Per site `[*leading, C]`, and for the weight delta `[*leading]` or absent (spec C5)."""

    masks: dict[str, Float[Tensor, "*leading C"]]
    delta_masks: dict[str, Float[Tensor, " *leading"]] | None


class Source(nn.Module):
    """Fills what ci leaves open (spec R1).

    Called with the observation, the name of the term (the key of its draws), the sites that are masked, and `loss`,
    which tells an adversary the value that some masks would give.
    """

    def forward(
        self, observation: Observation, *, term: str, sites: list[str], loss: Callable[[Masks], Tensor]
    ) -> Masks:
        raise NotImplementedError(
            f"{type(self).__name__} must make masks in forward(observation, term=, sites=, loss=)."
        )
