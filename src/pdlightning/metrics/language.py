"""What a language model loses when it runs through its subcomponents: CE and KL under six maskings (spec E2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from pdlightning.functional.components import interpolate_mask
from pdlightning.functional.kl import IGNORED, cross_entropy_pair, kl_pair
from pdlightning.masking import Masks
from pdlightning.masking.sources import draw_deltas, draw_uniform
from pdlightning.metrics.evaluation import Evaluation, Results
from pdlightning.modules.batches import token_ids
from pdlightning.observation import Observation

MASKINGS = ("ci", "unmasked", "stochastic", "random", "rounded", "zero")


class CEandKL(Evaluation):
    """Next-token cross-entropy, and KL to the target's own output, under six maskings (spec E2).

    Maskings: `ci`, m = ci; `unmasked`, m = 1; `stochastic`, uniform sources and delta masks; `random`, m ~ U[0, 1];
    `rounded`, m = (ci > threshold); `zero`. All but `stochastic` are without the weight delta.

    Logged, in nats: `ce_target`, and of each masking `kl_<masking>`, the mean over all positions; `ce_<masking>`, the
    mean over all labels; `ce_difference_<masking>` = CE - CE_target; and `ce_unrecovered_<masking>`, the fraction
    (CE - CE_target) / (CE_zero - CE_target). The threshold is in the name: `kl_rounded_0.1`.

    Args:
        threshold: of `rounded`.
    """

    kl: Tensor
    positions: Tensor
    ce: Tensor
    ce_target: Tensor
    labels: Tensor

    def __init__(self, *, threshold: float, **metric_arguments: Any):
        super().__init__(**metric_arguments)
        self.threshold = threshold
        for name, shape in (("kl", len(MASKINGS)), ("ce", len(MASKINGS)), ("ce_target", ())):
            self.add_state(name, torch.zeros(shape), dist_reduce_fx="sum")
        for name in ("positions", "labels"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def check(self, observation: Observation) -> None:
        tokens, shape = token_ids(observation.batch), tuple(observation.clean.output.shape)
        if tokens is None or tokens.ndim < 2 or tokens.shape[-1] < 2:
            x = observation.batch if tokens is None else tokens
            found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                "CEandKL predicts tokens, so a batch must be integers [batch, sequence] of at least two tokens, or a"
                f" tuple that begins with them, or a dict with input_ids; got {found}. Leave it out for other targets."
            )
        if shape[:-1] != tokens.shape or int(tokens.max()) >= shape[-1]:
            raise ValueError(
                f"CEandKL needs logits [batch, sequence, vocab] with a column for every token, but for tokens"
                f" {tuple(tokens.shape)} up to {int(tokens.max())} the target's output is {shape}."
            )

    def update(self, observation: Observation) -> None:
        self.check(observation)
        labels = next_tokens(observation.batch)
        for i, masking in enumerate(MASKINGS):
            kl, ce = self.sums(masking, observation, labels)
            self.kl[i] += kl
            self.ce[i] += ce
        total, count = cross_entropy_pair(observation.clean.output, labels)
        self.ce_target += total
        self.labels += count
        self.positions += labels.numel()

    def sums(self, masking: str, observation: Observation, labels: Tensor) -> tuple[Tensor, Tensor]:
        """KL and CE summed over a batch. The logits of one masking are gone before those of the next are made."""
        masks, clean = self.masks(masking, observation), observation.clean
        output = observation.model.masked(
            observation.batch, masks.masks, delta_masks=masks.delta_masks, clean=clean
        ).output
        kl, _ = kl_pair(clean.output, output, clean.log_normalizer)
        return kl, cross_entropy_pair(output, labels)[0]

    def masks(self, masking: str, observation: Observation) -> Masks:
        lower, term, sites = observation.ci.lower, self.term, observation.sites
        match masking:
            case "ci":
                return Masks(lower, None)
            case "unmasked":
                return Masks({s: torch.ones_like(x) for s, x in lower.items()}, None)
            case "stochastic":
                sources = {s: draw_uniform(observation, term=term, site=s) for s in sites}
                masks = {s: interpolate_mask(lower[s], sources[s]) for s in sites}
                return Masks(masks, draw_deltas(observation, term=term, sites=sites))
            case "random":
                draw = observation.random.uniform
                return Masks({s: draw(x.shape[-1], term, s, "mask").to(x.dtype) for s, x in lower.items()}, None)
            case "rounded":
                return Masks({s: (x > self.threshold).to(x.dtype) for s, x in lower.items()}, None)
            case _:
                return Masks({s: torch.zeros_like(x) for s, x in lower.items()}, None)

    def compute(self) -> Results:
        names = [f"rounded_{self.threshold:g}" if masking == "rounded" else masking for masking in MASKINGS]
        kl, ce, target = self.kl / self.positions, self.ce / self.labels, self.ce_target / self.labels
        difference = ce - target
        rows = {
            "kl": kl,
            "ce": ce,
            "ce_difference": difference,
            "ce_unrecovered": difference / difference[MASKINGS.index("zero")],
        }
        by_masking = {f"{row}_{name}": value for row, x in rows.items() for name, value in zip(names, x, strict=True)}
        del by_masking["ce_unrecovered_zero"]  # always 1
        return {"ce_target": target, **by_masking}


def next_tokens(batch: Any) -> Int[Tensor, "*rows sequence"]:
    """The label of every position: the next token of its own row, or -100 (no label) for the last of a row.

    A dict may say more: `labels` in place of its tokens (not shifted, -100 where there is none) and `attention_mask`,
    whose zeros neither predict nor are predicted. What a tuple has besides its tokens is not read.
    """
    tokens = token_ids(batch)
    assert tokens is not None
    attended = torch.ones_like(tokens, dtype=torch.bool)
    if isinstance(batch, Mapping):
        tokens = batch.get("labels", tokens)
        attended = batch.get("attention_mask", attended).bool()
    following = tokens[..., 1:].masked_fill(~(attended[..., 1:] & attended[..., :-1]), IGNORED)
    return torch.cat([following, torch.full_like(tokens[..., :1], IGNORED)], dim=-1)
