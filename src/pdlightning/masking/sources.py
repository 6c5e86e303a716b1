"""Sources without an adversary (spec R1): uniform, binomial, constant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pdlightning.functional.components import interpolate_mask
from pdlightning.masking.masks import Masks, Source
from pdlightning.observation import Observation


def draw_uniform(observation: Observation, *, term: str, site: str) -> Tensor:
    """The uniform source of one site, `[*leading, C]`, in the dtype of its ci."""
    ci = observation.ci.lower[site]
    return observation.random.uniform(ci.shape[-1], term, site, "source").to(ci.dtype)


def draw_deltas(observation: Observation, *, term: str, sites: list[str]) -> dict[str, Tensor]:
    """m_D ~ U[0, 1), one number per position and site (spec C5)."""
    dtype = observation.clean.output.dtype
    return {s: observation.random.uniform(1, term, s, "delta").squeeze(-1).to(dtype) for s in sites}


class Uniform(Source):
    """r ~ U[0, 1] per position and subcomponent, m_D ~ U[0, 1] per position unless `delta` is False."""

    def __init__(self, *, delta: bool = True):
        super().__init__()
        self.delta = delta

    def forward(
        self, observation: Observation, *, term: str, sites: list[str], loss: Callable[[Masks], Tensor]
    ) -> Masks:
        masks = {
            s: interpolate_mask(observation.ci.lower[s], draw_uniform(observation, term=term, site=s)) for s in sites
        }
        return Masks(masks, draw_deltas(observation, term=term, sites=sites) if self.delta else None)


class Binomial(Source):
    """r is 0 or 1 with probability 1/2 per position and subcomponent (spec R1); m_D stays uniform.

    Args:
        delta: whether the weight delta is masked too, rather than absent.
        noisy: interpolate the lower ci of 1.05 * logit - 0.05 * u, u ~ U[0, 1] (spec I3).
    """

    def __init__(self, *, delta: bool = True, noisy: bool = True):
        super().__init__()
        self.delta, self.noisy = delta, noisy

    def forward(
        self, observation: Observation, *, term: str, sites: list[str], loss: Callable[[Masks], Tensor]
    ) -> Masks:
        lower = observation.noisy_lower if self.noisy else observation.ci.lower
        masks = {
            s: interpolate_mask(lower[s], (draw_uniform(observation, term=term, site=s) >= 0.5).to(lower[s].dtype))
            for s in sites
        }
        return Masks(masks, draw_deltas(observation, term=term, sites=sites) if self.delta else None)


class Constant(Source):
    """r = value everywhere and no delta: 0 is the "ci" masking, 1 is "unmasked" (spec R1)."""

    def __init__(self, *, value: float):
        super().__init__()
        if not 0 <= value <= 1:
            raise ValueError(f"Constant(value): a source lies in [0, 1], got {value}.")
        self.value = value

    def forward(
        self, observation: Observation, *, term: str, sites: list[str], loss: Callable[[Masks], Tensor]
    ) -> Masks:
        lower = observation.ci.lower
        if self.value == 1:
            return Masks({s: torch.ones_like(lower[s]) for s in sites}, None)
        return Masks({s: lower[s] if self.value == 0 else lower[s] + (1 - lower[s]) * self.value for s in sites}, None)
