"""How one target is made: train, check, and try the next seed when the check fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from pdlightning.data.keyed import KeyedDataModule
from pdlightning.functional.schedules import ScheduleKind
from pdlightning.targets.checks import TargetCheck
from pdlightning.targets.training import Loss, TargetTraining, train_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class UnfitTargetError(RuntimeError):
    """No attempt to train a target passed its check."""


@dataclass(frozen=True, kw_only=True)
class TargetRecipe:
    """Everything that decides the weights of a target.

    Args:
        model: builds the untrained network from `seed=`.
        data: builds the training data, batches (x, label), from `seed=`.
        loss: from (output, label) to a scalar.
        check: judges the trained model, given it and the data.
        figures: from the model and the data to figures by name, kept beside the weights.
        steps: optimizer steps.
        lr, schedule, warmup_frac, weight_decay: see `TargetTraining`.
        seed: key of the first attempt; attempt n uses seed + n - 1 for weights and data.
        max_attempts: trainings at most.
    """

    model: Callable[..., nn.Module]
    data: Callable[..., KeyedDataModule]
    loss: Loss
    check: TargetCheck
    figures: Callable[..., Mapping[str, Figure]]
    steps: int
    lr: float
    schedule: ScheduleKind
    warmup_frac: float
    weight_decay: float
    seed: int
    max_attempts: int

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "max_attempts"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} of a target recipe must be positive, got {getattr(self, name)}.")

    def blank(self, seed: int) -> nn.Module:
        """The untrained network, frozen and in eval mode: ready for stored weights."""
        return self.model(seed=seed).eval().requires_grad_(False)

    def make(self, *, accelerator: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
        """Train until the check passes: the model, frozen, in eval mode and on the CPU, and how it went.

        Raises:
            UnfitTargetError: if no attempt passes.
        """
        failures = []
        for attempt in range(1, self.max_attempts + 1):
            seed = self.seed + attempt - 1
            rank_zero_info(f"Training the target, seed {seed} (attempt {attempt} of at most {self.max_attempts}).")
            start = perf_counter()
            model, data, loss = self.train(seed, accelerator)
            result = self.check(model, data)
            if result.passed:
                rank_zero_info(f"Target trained in {perf_counter() - start:.0f} s: {result.message}.")
                return model, {
                    "seed": seed,
                    "attempt": attempt,
                    "steps": self.steps,
                    "seconds": round(perf_counter() - start, 2),
                    "loss": loss,
                    "check": result.message,
                    "measures": result.measures,
                    "failed_attempts": failures,
                }
            failures.append(f"seed {seed}: {result.message}")
            rank_zero_warn(f"Target attempt {attempt} of {self.max_attempts} failed its check, {failures[-1]}.")
        raise UnfitTargetError(
            f"None of {self.max_attempts} trained targets passed the check; {'; '.join(failures)}. "
            "Train longer (steps), try other seeds (seed, max_attempts), or loosen the check."
        )

    def train(self, seed: int, accelerator: str) -> tuple[nn.Module, KeyedDataModule, float]:
        """One training: the frozen model, the data it saw and the last loss."""
        model, data = self.model(seed=seed).train(), self.data(seed=seed)
        training = TargetTraining(
            model=model,
            loss=self.loss,
            steps=self.steps,
            lr=self.lr,
            schedule=self.schedule,
            warmup_frac=self.warmup_frac,
            weight_decay=self.weight_decay,
        )
        loss = train_target(training, data, accelerator=accelerator)
        return model.eval().requires_grad_(False), data, loss
