"""The optimiser's two parameter groups and the warmup on faithfulness (spec 6 parts 9-10, S2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from pdlightning.metrics.faithfulness import Form, faithfulness
from pdlightning.modules.component_model import ComponentModel
from pdlightning.schedules import Value


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """The optimiser of one parameter group: components (V, U) or the ci function.

    Args:
        lr: learning rate, a number or a schedule.
        clip: greatest gradient norm of the group, or None.
    """

    lr: Value = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.lr) and not self.lr >= 0:
            raise ValueError(f"AdamW(lr): expected a number >= 0 or a schedule, got {self.lr}.")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"AdamW(clip): the greatest gradient norm must be above 0, or None, got {self.clip}.")

    def group(self, name: str, parameters: Iterable[nn.Parameter]) -> dict[str, object]:
        """A parameter group of torch.optim.AdamW; its lr is set before every step."""
        return {
            "params": list(parameters),
            "name": name,
            "lr": 0.0,
            "betas": tuple(self.betas),
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }

    def lr_at(self, step: int, steps: int) -> float:
        return self.lr(step, steps) if callable(self.lr) else self.lr


@dataclass(frozen=True, kw_only=True)
class FaithfulnessWarmup:
    """AdamW on faithfulness alone, over V and U, before step 0; its optimiser is discarded (spec S2)."""

    steps: int = 200
    lr: float = 1e-2
    weight_decay: float = 0.1
    form: Form = "mean_squared"

    def __post_init__(self) -> None:
        if self.steps < 0 or self.lr <= 0:
            raise ValueError(f"FaithfulnessWarmup: steps must be >= 0 and lr > 0, got {self.steps} and {self.lr}.")

    def run(self, model: ComponentModel) -> None:
        optimizer = torch.optim.AdamW(model.components.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        for _ in range(self.steps):
            optimizer.zero_grad()
            model(lambda: faithfulness(model, self.form)).backward()
            optimizer.step()
        optimizer.zero_grad()
