"""The fresh adversary: projected gradient ascent on the sources of one term (spec L5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from pdlightning.functional.components import interpolate_mask
from pdlightning.functional.random import KeyedRandom
from pdlightning.masking.masks import Masks, Source
from pdlightning.observation import Observation
from pdlightning.ranks import means_over_ranks

Init = Literal["random", "ones", "zeros"]
Scope = Literal["per_position", "shared"]


class PGD(Source):
    """n_steps of r += step_size * sign(grad), clamped to [0, 1], from a fresh start (spec L5).

    Args:
        n_steps: ascents before the forward that is trained on.
        step_size: of one ascent, in units of the source.
        init: where the sources start.
        scope: `per_position`, or `shared`: one vector per site for all positions.
        delta: whether the weight deltas are attacked too, each by its own source.

    From `init="ones"` with the delta nothing moves: every subcomponent and the whole delta are in place, so the output
    is the target's, and loss and gradient are 0 up to rounding. Take `delta=False`, or another start.
    """

    adversarial = True

    def __init__(self, *, n_steps: int, step_size: float, init: Init, scope: Scope, delta: bool = True):
        super().__init__()
        if n_steps < 0 or step_size <= 0:
            raise ValueError(f"PGD: n_steps must be >= 0 and step_size > 0, got {n_steps} and {step_size}.")
        if init not in ("random", "ones", "zeros") or scope not in ("per_position", "shared"):
            raise ValueError(
                f"PGD: init is random, ones or zeros and scope per_position or shared, got {init}, {scope}."
            )
        self.n_steps, self.step_size, self.delta = n_steps, step_size, delta
        self.init: Init = init
        self.scope: Scope = scope

    def forward(
        self, observation: Observation, *, term: str, sites: list[str], loss: Callable[[Masks], Tensor]
    ) -> Masks:
        sources = self.start(observation, term=term, sites=sites)
        ascend = torch.compiler.disable()(self.ascend)  # autograd inside a compiled function
        for _ in range(self.n_steps):
            sources = ascend(observation, sources, loss=loss)
        return self.masks(observation, sources, detach_ci=False)

    def trajectory(
        self, observation: Observation, *, term: str, sites: list[str], loss: Callable[[Masks], Tensor]
    ) -> Iterator[Masks]:
        """The masks after 0, 1, 2, ... ascents, without end: for evaluation at several strengths."""
        sources = self.start(observation, term=term, sites=sites)
        while True:
            yield self.masks(observation, sources, detach_ci=True)
            sources = self.ascend(observation, sources, loss=loss)

    def start(self, observation: Observation, *, term: str, sites: list[str]) -> list[tuple[str, str, Tensor]]:
        """(site, "source" or "delta", value) for everything that is attacked."""
        random = observation.random
        leading = observation.leading
        if self.scope == "shared":
            one = torch.zeros(1, dtype=torch.int32, device=random.a.device)
            random = KeyedRandom.at(seed=random.seed, step=random.step, samples=one, inner=(1,) * (len(leading) - 1))
            leading = (1,) * len(leading)
        widths = [(s, "source", observation.ci.lower[s].shape[-1]) for s in sites]
        widths += [(s, "delta", 1) for s in sites] if self.delta else []
        like = observation.clean.output
        if self.init == "random":
            return [(s, what, random.uniform(n, term, s, what).to(like.dtype)) for s, what, n in widths]
        value = 1.0 if self.init == "ones" else 0.0
        return [(s, what, like.new_full((*leading, n), value)) for s, what, n in widths]

    def ascend(
        self,
        observation: Observation,
        sources: list[tuple[str, str, Tensor]],
        *,
        loss: Callable[[Masks], Tensor],
    ) -> list[tuple[str, str, Tensor]]:
        """One ascent. Needs grad even where the caller evaluates without it (spec E6)."""
        return self.moved(sources, self.gradients(observation, sources, loss=loss))

    def gradients(
        self,
        observation: Observation,
        sources: list[tuple[str, str, Tensor]],
        *,
        loss: Callable[[Masks], Tensor],
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_() for _, _, value in sources]
            named = [(s, what, leaf) for (s, what, _), leaf in zip(sources, leaves, strict=True)]
            gradients = torch.autograd.grad(loss(self.masks(observation, named, detach_ci=True)), leaves)
        return tuple(means_over_ranks(gradients)) if self.scope == "shared" else gradients

    def moved(
        self, sources: list[tuple[str, str, Tensor]], gradients: Sequence[Tensor]
    ) -> list[tuple[str, str, Tensor]]:
        return [
            (s, what, (value + self.step_size * gradient.sign()).clamp_(0.0, 1.0))
            for (s, what, value), gradient in zip(sources, gradients, strict=True)
        ]

    def masks(self, observation: Observation, sources: list[tuple[str, str, Tensor]], *, detach_ci: bool) -> Masks:
        lower = observation.ci.lower
        masks = {
            s: interpolate_mask(lower[s].detach() if detach_ci else lower[s], value)
            for s, what, value in sources
            if what == "source"
        }
        deltas = {s: value.squeeze(-1).expand(observation.leading) for s, what, value in sources if what == "delta"}
        return Masks(masks, deltas if self.delta else None)
