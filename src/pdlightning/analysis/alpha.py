"""The alpha sweep: what a decomposition costs when all that ci leaves open is filled with one number r (spec R1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from pdlightning.analysis.evaluation import as_evaluated
from pdlightning.functional.kl import cross_entropy_pair, kl_pair
from pdlightning.functional.losses import squared_error
from pdlightning.masking import Constant, Masks
from pdlightning.metrics.language import next_tokens
from pdlightning.modules.batches import token_ids
from pdlightning.observation import Observation

if TYPE_CHECKING:
    from pdlightning.loading import LoadedRun


@dataclass
class Mean:
    """sum / count at the very end (spec R4)."""

    total: float = 0.0
    count: int = 0

    def add(self, pair: tuple[Tensor, Tensor | int]) -> None:
        self.total += float(pair[0])
        self.count += int(pair[1])

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")


@dataclass(frozen=True)
class AlphaSweep:
    """Of one run.

    Attributes:
        sources: the values of r.
        values: measure -> its value at each of them. Of tokens `ce` and `kl`, in nats; of vectors `mse`.
        target: measure -> that of the target itself: the CE of tokens.
    """

    sources: list[float]
    values: dict[str, list[float]]
    target: dict[str, float] = field(default_factory=dict)


def alpha_sweep(run: LoadedRun, sources: Sequence[float]) -> AlphaSweep:
    """The output of the target through masks m = ci + (1 - ci) r of all sites, without delta, for each r in [0, 1].

    `ce` is the next-token cross-entropy over all labels; `kl` the KL to the clean output over positions; `mse` the
    squared error to the clean output over elements; each over the whole evaluation data of the run.
    """
    found: dict[str, list[Mean]] = {}
    target = Mean()
    with as_evaluated(run) as observations:
        for observation in observations:
            labels = labels_of(observation)
            if labels is not None:
                target.add(cross_entropy_pair(observation.clean.output, labels))
            for i, r in enumerate(sources):
                for measure, pair in measured(observation, r, labels).items():
                    found.setdefault(measure, [Mean() for _ in sources])[i].add(pair)
    values = {measure: [mean.value for mean in means] for measure, means in found.items()}
    return AlphaSweep(list(sources), values, {"ce": target.value} if "ce" in values else {})


def labels_of(observation: Observation) -> Tensor | None:
    """The next token of every position, where the output has a column for every token; None of vectors."""
    tokens, output = token_ids(observation.batch), observation.clean.output
    if tokens is None or output.shape[:-1] != tokens.shape or int(tokens.max()) >= output.shape[-1]:
        return None
    return next_tokens(observation.batch)


def measured(observation: Observation, r: float, labels: Tensor | None) -> dict[str, tuple[Tensor, Tensor | int]]:
    masks = Constant(value=r)(observation, term="alpha", sites=observation.sites, loss=no_adversary).masks
    clean = observation.clean
    output = observation.model.masked(observation.batch, masks, clean=clean).output
    if labels is None:
        return {"mse": squared_error(clean.output, output)}
    return {"ce": cross_entropy_pair(output, labels), "kl": kl_pair(clean.output, output, clean.log_normalizer)}


def no_adversary(masks: Masks) -> Tensor:
    raise RuntimeError("A constant source asks for no loss.")
