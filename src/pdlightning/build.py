"""From a resolved config (a plain dict) to the objects of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch import nn

from pdlightning.callbacks.evaluate import Evaluate
from pdlightning.config import ConfigError, instantiate, validate
from pdlightning.decomposition import ParameterDecomposition
from pdlightning.targets import CheckResult, TargetRecipe, obtain_target

Config = dict[str, Any]
BUILT = ("target", "data", "pd", "metric", "logging")


def validate_config(config: Config) -> None:
    """Bind every `_target_` of the parts that will be built, before any of them is (design decision 6)."""
    problems = []
    for part in BUILT:
        try:
            validate(config[part], allow=config["allow"], path=part)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    if not isinstance(config["steps"], int) or config["steps"] < 1:
        raise ConfigError(f"steps: expected a whole number of training steps >= 1, got {config['steps']!r}.")
    if unknown := [name for name, goal in config["goal"].items() if not goal.keys() <= {"min", "max"}]:
        raise ConfigError(f"goal: expected min and/or max for {', '.join(unknown)}.")


@dataclass(frozen=True)
class Target:
    """The frozen network; `recipe` and `seed` where we trained it ourselves and can rebuild it from its weights."""

    model: nn.Module
    summary: dict[str, Any]
    folder: Path | None = None


def build_target(config: Config) -> Target:
    """The target of a config: trained or found in the cache, or any nn.Module, frozen."""
    built = instantiate(config["target"], allow=config["allow"], path="target")
    if isinstance(built, TargetRecipe):
        identity = config["target"]
        if not config["check_target"]:
            built, identity = replace(built, check=unchecked), {**identity, "check": None}
        result = obtain_target(
            built,
            config=identity,
            cache_dir=config["cache_dir"],
            accelerator=config["runtime"]["accelerator"],
        )
        return Target(result.model, result.summary, result.folder)
    if isinstance(built, nn.Module):
        return Target(built.eval().requires_grad_(False), {})
    raise ConfigError(f"target: expected a TargetRecipe or an nn.Module, {config['target']['_target_']} is a {type(built).__name__}.")


def unchecked(model: nn.Module, data: LightningDataModule) -> CheckResult:
    return CheckResult(True, "NOT CHECKED (check_target=false): it may have dropped features", {})


def blank_target(config: Config, seed: int) -> nn.Module:
    """The untrained network of a target that we train, ready for stored weights."""
    return instantiate(config["target"], allow=config["allow"], path="target").blank(seed)


def build_decomposition(config: Config, target: nn.Module) -> ParameterDecomposition:
    decomposition = instantiate(config["pd"], allow=config["allow"], path="pd")(target=target)
    decomposition.steps = config["steps"]
    return decomposition


def build_data(config: Config) -> LightningDataModule:
    return instantiate(config["data"], allow=config["allow"], path="data")


def build_evaluation(config: Config, **arguments: Any) -> Evaluate:
    metrics: Mapping[str, Any] = instantiate(config["metric"], allow=config["allow"], path="metric")
    return Evaluate(
        metrics=metrics["fast"],
        slow_metrics=metrics["slow"],
        every=config["logging"]["eval_every"],
        slow_every=config["logging"]["slow_eval_every"],
        **arguments,
    )
