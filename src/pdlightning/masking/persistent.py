"""The persistent adversary: sources that live across steps and climb the gradient of their term (spec L6)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pdlightning.functional.components import interpolate_mask
from pdlightning.functional.random import KeyedRandom
from pdlightning.masking.ascent import Ascent
from pdlightning.masking.held import HeldSource
from pdlightning.masking.masks import Masks, Source, TermValue
from pdlightning.masking.pgd import Init
from pdlightning.modules.ci import site_key
from pdlightning.modules.component_model import ComponentModel
from pdlightning.observation import Observation
from pdlightning.ranks import means_over_ranks, n_ranks

PersistentScope = Literal["single", "per_position_shared_batch", "repeat", "per_sample_per_position"]
Parameterisation = Literal["clamp", "sigmoid"]
SCOPES = ("single", "per_position_shared_batch", "repeat", "per_sample_per_position")


class PersistentPGD(Source):
    """Sources that ascend in every training step and are kept for the next (spec L6).

    One step: `n_warmup` ascents with ci, V and U detached, the routing of the term drawn afresh for each (under the key
    `<term>/warmup0`, ...); the forward of the term; one ascent along the gradient that the one backward of the step has
    left on the sources, divided by the coefficient. While the coefficient is 0 only the warmups move them.

    In evaluation nothing moves and nothing is warmed up: the term is measured with the sources as they stand, sample b
    with source b mod n; before the first step, with sources of a start of its own. `PGD` is the adversary for metrics.

    The sources are buffers, made for the first batch, float32 at the least. Checkpoints hold them with the state of
    their ascents; one made because a step failed half-way has the warmups of that step in them.

    Args:
        optimizer: `SignAscent`, `AdamAscent` or `SGDAscent`.
        scope: which positions share a source. With positions `[batch, T]` a site has `single` (1, 1, C),
            `per_position_shared_batch` (1, T, C), `repeat` (n_sources, T, C), where sample b uses source b mod
            n_sources, or `per_sample_per_position` (batch, T, C), local to a rank.
        n_warmup: ascents before the forward that is trained on.
        n_sources: of the scope `repeat`; it divides the batch of a rank.
        init: where the sources start. From ones with the delta there is nothing to climb: see `PGD`.
        parameterisation: `clamp` to [0, 1] after every ascent, or `sigmoid` of logits that start from N(0, 1).
        delta: whether the weight deltas are attacked too, each by a source of its own.
    """

    adversarial = True
    held_as = HeldSource
    anchor: Tensor

    def __init__(
        self,
        *,
        optimizer: Ascent,
        scope: PersistentScope,
        n_warmup: int,
        n_sources: int | None = None,
        init: Init = "random",
        parameterisation: Parameterisation = "clamp",
        delta: bool = True,
    ):
        super().__init__()
        name = type(self).__name__
        if scope not in SCOPES or n_warmup < 0:
            raise ValueError(f"{name}: scope is one of {', '.join(SCOPES)} and n_warmup >= 0, got {scope}, {n_warmup}.")
        if (scope == "repeat") != (n_sources is not None) or (n_sources is not None and n_sources < 1):
            raise ValueError(f"{name}: the scope repeat takes n_sources >= 1, no other does; got {scope}, {n_sources}.")
        if init not in ("random", "ones", "zeros") or parameterisation not in ("clamp", "sigmoid"):
            raise ValueError(
                f"{name}: init is random, ones or zeros and parameterisation clamp or sigmoid, got {init},"
                f" {parameterisation}."
            )
        if parameterisation == "sigmoid" and init != "random":
            raise ValueError(f"{name}: no logit has the sigmoid 0 or 1, so sigmoid takes init random, got {init}.")
        self.optimizer, self.n_warmup, self.n_sources, self.delta = optimizer, n_warmup, n_sources, delta
        self.scope: PersistentScope = scope
        self.init: Init = init
        self.parameterisation: Parameterisation = parameterisation
        self.held = nn.ModuleDict()
        self.widths: dict[str, int] = {}
        self.register_buffer("anchor", torch.empty(0), persistent=False)  # knows the device before anything is held

    @property
    def rows(self) -> int | None:
        """How many samples have a source of their own; None for as many as the batch has."""
        return {"repeat": self.n_sources, "per_sample_per_position": None}.get(self.scope, 1)

    def prepare(self, model: ComponentModel) -> None:
        self.widths = {key: width for path, c in model.components.items() for key, width in self.entries(path, c.C)}

    def entries(self, site: str, C: int) -> list[tuple[str, int]]:
        """(key, width) of what is held for a site: its source, and that of its delta."""
        return [(held_key(site, "source"), C), *([(held_key(site, "delta"), 1)] if self.delta else [])]

    def forward(self, observation: Observation, *, term: str, sites: list[str], loss: Any) -> Masks:
        if not self.held:
            self.make(observation, term=term)
        self.check_positions(observation)
        return self.masks(observation, term=term, sites=sites, detach_ci=False)

    def masks(self, observation: Observation, *, term: str, sites: list[str], detach_ci: bool) -> Masks:
        lower = {s: observation.ci.lower[s].detach() if detach_ci else observation.ci.lower[s] for s in sites}
        masks = {s: interpolate_mask(lower[s], self.at_positions(observation, term, s, "source")) for s in sites}
        if not self.delta:
            return Masks(masks, None)
        deltas = {s: self.at_positions(observation, term, s, "delta").squeeze(-1).to(lower[s].dtype) for s in sites}
        return Masks(masks, {s: delta.expand(observation.leading) for s, delta in deltas.items()})

    def at_positions(self, observation: Observation, term: str, site: str, what: str) -> Tensor:
        """The source of every position, in the order of the batch; axes that are shared keep the size 1."""
        held = self.held[held_key(site, what)]
        assert isinstance(held, HeldSource)
        value = self.value_of(held, observation, term=term)
        if self.parameterisation == "sigmoid":
            value = value.sigmoid()
        return for_samples(value, observation)

    def value_of(self, held: HeldSource, observation: Observation, *, term: str) -> Tensor:
        return held.leaf

    @torch.compiler.disable(recursive=False)  # gradients are taken here; what is differentiated may be compiled
    def warm_up(self, observation: Observation, *, term: str, value: TermValue) -> None:
        self.begin(observation, term=term)
        leaves, components = self.leaves(), observation.model.components
        components.requires_grad_(False)
        try:
            for i in range(self.n_warmup):
                with torch.enable_grad():
                    current = value(
                        f"{term}/warmup{i}",
                        lambda sites: self.masks(observation, term=term, sites=sites, detach_ci=True),
                    )
                self.move(list(torch.autograd.grad(current, leaves)))
        finally:
            components.requires_grad_(True)

    @torch.compiler.disable()
    def begin(self, observation: Observation, *, term: str) -> None:
        """What comes first in a training step."""
        if not self.held:
            self.make(observation, term=term)
        self.check_batch(observation.leading[0])
        self.check_positions(observation)

    def leaves(self) -> list[Tensor]:
        return [held.leaf for held in self.held.values()]  # type: ignore[misc]

    def after_backward(self, *, weight: float) -> None:
        leaves = self.leaves()
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        if not leaves or len(gradients) < len(leaves):
            absent = [key for key, leaf in zip(self.held, leaves, strict=True) if leaf.grad is None]
            raise RuntimeError(
                f"The backward of this step has not reached the persistent sources {absent or 'at all'}: they ascend"
                " after each backward of a total loss, once."
            )
        for leaf in leaves:
            leaf.grad = None
        self.move(gradients if weight == 1 else [gradient.div_(weight) for gradient in gradients])

    @torch.compiler.disable()
    @torch.no_grad()
    def move(self, gradients: list[Tensor]) -> None:
        """One ascent of everything that is held."""
        held: list[HeldSource] = list(self.held.values())  # type: ignore[arg-type]
        leaves = self.leaves()
        state = {name: [h.read(name) for h in held] for name in ("count", *self.optimizer.moments)}
        for count in state["count"]:
            count.add_(1)
        self.optimizer(leaves, reduce_gradients(gradients, scope=self.scope), state)
        for i, h in enumerate(held):
            if self.parameterisation == "clamp":
                leaves[i].clamp_(0.0, 1.0)
            h.write({name: tensors[i] for name, tensors in state.items()})

    @torch.no_grad()
    def make(self, observation: Observation, *, term: str) -> None:
        """The sources at their start, drawn by the key (seed, term, site, sample, position)."""
        for site in observation.sites:
            for key, width in self.entries(site, observation.ci.lower[site].shape[-1]):
                value = self.start(observation, width, term, site, key.rpartition(":")[2], "start")
                self.held[key] = self.held_as(value, moments=self.optimizer.moments)

    def start(self, observation: Observation, width: int, *name: str) -> Tensor:
        now, samples, inner = observation.random, observation.samples_in_order, observation.leading[1:]
        if self.scope != "per_sample_per_position":
            samples = torch.arange(self.rows or 1, dtype=samples.dtype, device=samples.device)
        inner = (1,) * len(inner) if self.scope == "single" else inner
        random = KeyedRandom.at(seed=now.seed, step=torch.zeros_like(now.step), samples=samples, inner=inner)
        dtype = torch.promote_types(observation.clean.output.dtype, torch.float32)
        if self.parameterisation == "sigmoid":
            return random.normal(width, *name).to(dtype)
        if self.init == "random":
            return random.uniform(width, *name).to(dtype)
        value = 1.0 if self.init == "ones" else 0.0
        return torch.full((len(samples), *inner, width), value, dtype=dtype, device=samples.device)

    def check_training(self, *, micro_batches: int, loss_scaled: bool) -> None:
        name = f"{type(self).__name__}(scope={self.scope}, n_warmup={self.n_warmup})"
        if loss_scaled:
            raise ValueError(f"{name} cannot ascend a gradient that precision=16-mixed has scaled: take bf16-mixed.")
        if micro_batches > 1 and (self.n_warmup or self.rows is None):
            raise ValueError(
                f"{name} with accumulate_grad_batches={micro_batches}: a warmup would see one part of the batch, and"
                " sources of single samples would serve several. Accumulation takes n_warmup=0 and another scope."
            )

    def check_batch(self, samples: int) -> None:
        if self.rows is not None and samples % self.rows:
            raise ValueError(
                f"PersistentPGD(scope=repeat): n_sources={self.rows} does not divide the {samples} samples that a rank"
                " has of each batch."
            )
        held = len(self.leaves()[0]) if self.held else samples
        if self.rows is None and held != samples:
            raise ValueError(
                f"{type(self).__name__} holds sources for {held} samples, but the batch has {samples}. Give all"
                " training batches one size (drop_last=True), or take another scope."
            )

    def check_positions(self, observation: Observation) -> None:
        held, inner = tuple(self.leaves()[0].shape[1:-1]), observation.leading[1:]
        if len(held) != len(inner) or (self.scope != "single" and held != inner):
            raise ValueError(
                f"{type(self).__name__} holds sources for samples with positions {held}, but the batch has {inner}."
                " Give all batches one length, or take the scope single."
            )

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Make what the checkpoint holds before a batch could tell its shape."""
        start = f"{prefix}held."
        stored = {
            key.removeprefix(start).removesuffix(".value"): value
            for key, value in state_dict.items()
            if key.startswith(start) and key.endswith(".value")
        }
        if stored and (problem := self.misfit(stored)):
            error_msgs.append(problem)
            for key in [key for key in state_dict if key.startswith(start)]:
                del state_dict[key]
        elif stored:
            self.held.clear()
            for key, value in stored.items():
                like = torch.empty_like(value, device=self.anchor.device)
                self.held[key] = self.held_as(like, moments=self.optimizer.moments)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def misfit(self, stored: dict[str, Tensor]) -> str | None:
        """Why stored sources are not of these sites and this scope, if they are not."""
        if stored.keys() != self.widths.keys():
            return f"The stored persistent sources are {sorted(stored)}, expected {sorted(self.widths)}."
        for key, value in stored.items():
            leading, width = tuple(value.shape[:-1]), value.shape[-1]
            if width != self.widths[key]:
                return f"The stored persistent source {key} has C={width}, expected C={self.widths[key]}."
            if leading[0] != (self.rows or leading[0]) or (self.scope == "single" and any(n != 1 for n in leading)):
                return f"The stored persistent source {key} has positions {leading}, which scope={self.scope} has not."
        return None


def held_key(site: str, what: str) -> str:
    return f"{site_key(site)}:{what}"


def for_samples(value: Tensor, observation: Observation) -> Tensor:
    """Row b mod n of n rows for sample b, in the order of the batch; a single row stays one."""
    n, batch = len(value), observation.leading[0]
    if n == 1:
        return value
    if batch % n:
        value = value[torch.arange(batch, device=value.device) % n]
    elif n != batch:
        value = value.repeat(batch // n, *(1,) * (value.ndim - 1))  # its backward is a sum in a fixed order
    return value if observation.rows is None else value[observation.rows]


def reduce_gradients(gradients: list[Tensor], *, scope: PersistentScope) -> list[Tensor]:
    """From the gradient of a rank's term to that of the term over all ranks, which counts all their samples (spec D2).

    Of sources that the ranks share this is the average, and they stay identical; of sources of single samples, local to
    their rank, the part that the rank has in it.
    """
    if scope != "per_sample_per_position":
        return means_over_ranks(gradients)
    return [gradient / n_ranks() for gradient in gradients] if n_ranks() > 1 else gradients
