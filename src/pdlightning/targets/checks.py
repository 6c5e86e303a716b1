"""Is a trained target worth decomposing? A decomposition of a network that dropped a feature cannot find it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pdlightning.data.keyed import KeyedDataModule
from pdlightning.data.sparse import SparseFeatures


@dataclass(frozen=True)
class CheckResult:
    """What a check found: a verdict, a sentence that explains it, and the numbers behind it."""

    passed: bool
    message: str
    measures: dict[str, float]


# From a trained model (in eval mode, on the CPU) and the data it was trained on.
TargetCheck = Callable[..., CheckResult]


class FeaturesRepresented:
    """Does every feature, active alone, come out as its label?

    For each value v and feature i the input is v at i and 0 elsewhere; feature i is represented if
    |y_i - label_i| <= tolerance for every v.

    Args:
        values: the inputs tried, such as [1.0], or [1.0, -1.0] where inputs have both signs.
        tolerance: largest deviation of the output from the label, in units of the output.
    """

    def __init__(self, *, values: Sequence[float], tolerance: float) -> None:
        if not values or 0 in values:
            raise ValueError(f"values must be one or more numbers other than 0, got {list(values)}.")
        if tolerance <= 0:
            raise ValueError(f"tolerance must be positive, got {tolerance}.")
        self.values = values
        self.tolerance = tolerance

    @torch.no_grad()
    def __call__(self, model: nn.Module, data: SparseFeatures) -> CheckResult:
        labels = data.labels
        if labels is None:
            raise ValueError("FeaturesRepresented compares outputs with labels: give SparseFeatures its labels.")
        eye = torch.eye(data.n_features)
        errors = torch.stack([model(v * eye) - labels(v * eye) for v in self.values])
        own = errors.diagonal(dim1=-2, dim2=-1).abs().amax(0)
        others = (errors * (1 - eye)).abs().max().item()
        dropped = (~(own <= self.tolerance)).nonzero().flatten().tolist()
        tried = ", ".join(f"{v:g}" for v in self.values)
        if dropped:
            message = f"{len(dropped)} of {data.n_features} features not represented: " + ", ".join(
                f"{i} (off by {own[i]:.3f})" for i in dropped[:20]
            )
        else:
            message = f"all {data.n_features} features represented, the worst off by {own.max():.3f}"
        message += f"; inputs {tried}, tolerance {self.tolerance:g}"
        return CheckResult(
            not dropped,
            message,
            {"worst_own_error": own.max().item(), "mean_own_error": own.mean().item(), "worst_interference": others},
        )


class LastPositionAccuracy:
    """Is the label of the last position the likeliest token in at least `at_least` of the eval sequences?"""

    def __init__(self, *, at_least: float) -> None:
        if not 0 < at_least <= 1:
            raise ValueError(f"at_least must be in (0, 1], got {at_least}.")
        self.at_least = at_least

    @torch.no_grad()
    def __call__(self, model: nn.Module, data: KeyedDataModule) -> CheckResult:
        right = [(model(tokens)[:, -1].argmax(-1) == label) for tokens, label in data.val_dataloader()]
        accuracy = torch.cat(right).float().mean().item()
        return CheckResult(
            accuracy >= self.at_least,
            f"accuracy {accuracy:.3f} at the last position, at least {self.at_least:g} wanted",
            {"accuracy": accuracy},
        )
