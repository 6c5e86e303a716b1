"""A pool of persistent particles for every sample (spec L6)."""

from __future__ import annotations

import torch
from torch import Tensor

from pdlightning.masking.ascent import Ascent
from pdlightning.masking.held import HeldParticles, HeldSource
from pdlightning.masking.persistent import Parameterisation, PersistentPGD
from pdlightning.masking.pgd import Init
from pdlightning.observation import Observation


class ParticlePool(PersistentPGD):
    """A persistent adversary with n sources (n, batch, T, C) for each sample and position, local to the rank.

    In every step each sample draws one of its particles by key, for all its positions and sites. The warmups, the
    forward and the last ascent are of that particle; the others rest, with their moments and their numbers of ascents.

    Args:
        n_particles: of each sample.
        optimizer, n_warmup, init, parameterisation, delta: see `PersistentPGD`.
    """

    held_as = HeldParticles

    def __init__(
        self,
        *,
        n_particles: int,
        optimizer: Ascent,
        n_warmup: int,
        init: Init = "random",
        parameterisation: Parameterisation = "clamp",
        delta: bool = True,
    ):
        if n_particles < 1:
            raise ValueError(f"ParticlePool: n_particles must be >= 1, got {n_particles}.")
        super().__init__(
            optimizer=optimizer, scope="per_sample_per_position", n_warmup=n_warmup, init=init,
            parameterisation=parameterisation, delta=delta,
        )  # fmt: skip
        self.n_particles = n_particles

    def start(self, observation: Observation, width: int, *name: str) -> Tensor:
        start = super().start
        return torch.stack([start(observation, width, *name, str(k)) for k in range(self.n_particles)])

    def drawn(self, observation: Observation, *, term: str, among: int) -> tuple[Tensor, Tensor]:
        """(particle, sample) of every sample as the batch came, where `among` samples have particles."""
        samples = observation.samples_in_order
        chance = observation.random_of(samples).uniform(1, term, "particle").squeeze(-1)
        return (self.n_particles * chance).long(), torch.arange(len(samples), device=samples.device) % among

    @torch.compiler.disable()
    def begin(self, observation: Observation, *, term: str) -> None:
        super().begin(observation, term=term)
        place = self.drawn(observation, term=term, among=observation.leading[0])
        for held in self.held.values():
            assert isinstance(held, HeldParticles)
            held.use(place)

    def value_of(self, held: HeldSource, observation: Observation, *, term: str) -> Tensor:
        if observation.training:
            return held.leaf
        return held.value[self.drawn(observation, term=term, among=held.value.shape[1])]

    def misfit(self, stored: dict[str, Tensor]) -> str | None:
        for key, value in stored.items():
            if len(value) != self.n_particles:
                return f"The stored pool {key} has {len(value)} particles for each sample, expected {self.n_particles}."
        return super().misfit(stored)
