"""Which sites run through their subcomponents, per position (spec R2)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def subset_routes(
    size: Float[Tensor, "*leading 1"], scores: Float[Tensor, "*leading n_sites"]
) -> Bool[Tensor, "*leading n_sites"]:
    """The k sites of lowest score, k = 1 + floor(n_sites * size), from uniform numbers in [0, 1) (spec R2)."""
    k = 1 + (scores.shape[-1] * size).long()
    rank = scores.argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank < k


def uniform_subset_routes(
    n_sites: int, leading_shape: tuple[int, ...], generator: torch.Generator | None = None
) -> Bool[Tensor, "*leading n_sites"]:
    """Per position k ~ U{1..n_sites}, then a uniformly random k-subset of the sites (spec R2)."""
    if n_sites < 1:
        raise ValueError(f"uniform_subset_routes needs at least one site, got n_sites={n_sites}.")
    device = generator.device if generator is not None else None
    size, scores = (torch.rand(*leading_shape, n, generator=generator, device=device) for n in (1, n_sites))
    return subset_routes(size, scores)
