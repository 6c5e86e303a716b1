"""How one target is made: train, check, and try the next seed when the check fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from lightning import LightningDataModule
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


@dataclass(frozen=True)
class Trained:
    """What a recipe made: the network, frozen, in eval mode and on the CPU; how it went; what to keep beside it.

    `figures` by name, and `tables`: the text of CSV files by name.
    """

    model: nn.Module
    summary: dict[str, Any]
    figures: Mapping[str, Figure]
    tables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """How a target is made: what every kind of recipe says, and what the rest of the package needs of it.

    Args:
        model: builds the untrained network from `seed=`.
        data: builds the training data, batches (x, label), from `seed=`.
        check: judges the trained model, given it and the data.
        steps: optimizer steps.
        lr: learning rate, at its peak.
        seed: key of the weights and the data.
    """

    model: Callable[..., nn.Module]
    data: Callable[..., LightningDataModule]
    check: TargetCheck
    steps: int
    lr: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "lr"):
            self.check_positive(name)

    def check_positive(self, name: str) -> None:
        if getattr(self, name) <= 0:
            raise ValueError(f"{name} of a target recipe must be positive, got {getattr(self, name)}.")

    def blank(self, seed: int) -> nn.Module:
        """The untrained network, frozen and in eval mode: ready for stored weights."""
        return self.model(seed=seed).eval().requires_grad_(False)

    def beyond_config(self) -> dict[str, Any]:
        """What decides the weights and stands in no config, as plain values."""
        return {}

    @abstractmethod
    def make(self, *, accelerator: str, workspace: Path) -> Trained:
        """Train the target.

        Args:
            accelerator: what to train on.
            workspace: a folder for what a long training keeps in case it is interrupted. It stays until the target
                is stored.

        Raises:
            UnfitTargetError: if the check fails.
        """


@dataclass(frozen=True, kw_only=True)
class TargetRecipe(Recipe):
    """Everything that decides the weights of a small target, trained in seconds or minutes.

    Args:
        model, data, check, steps, lr: see `Recipe`.
        loss: from (output, label) to a scalar.
        figures: from the model and the data to figures by name, kept beside the weights.
        schedule, warmup_frac, weight_decay: see `TargetTraining`.
        seed: key of the first attempt; attempt n uses seed + n - 1 for weights and data.
        max_attempts: trainings at most.
    """

    data: Callable[..., KeyedDataModule]
    loss: Loss
    figures: Callable[..., Mapping[str, Figure]]
    schedule: ScheduleKind
    warmup_frac: float
    weight_decay: float
    max_attempts: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("max_attempts")

    def make(self, *, accelerator: str, workspace: Path) -> Trained:
        """Train until the check passes.

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
                summary = {
                    "seed": seed,
                    "attempt": attempt,
                    "steps": self.steps,
                    "seconds": round(perf_counter() - start, 2),
                    "loss": loss,
                    "check": result.message,
                    "measures": result.measures,
                    "failed_attempts": failures,
                }
                return Trained(model, summary, self.figures(model, data))
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
