"""From a resolved config (a plain dict) to the objects of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from pdlightning.callbacks.evaluate import Evaluate
from pdlightning.config import ConfigError, instantiate, validate
from pdlightning.decomposition import ParameterDecomposition
from pdlightning.metrics.evaluation import Evaluation
from pdlightning.metrics.loss import Loss
from pdlightning.schema import check_settings
from pdlightning.storage import weights_sha256
from pdlightning.targets import CheckResult, Recipe, obtain_target

Config = dict[str, Any]
BOUND = ("target", "data", "pd", "metric")


def validate_config(config: Config) -> None:
    """Check every setting, and bind every `_target_` of the parts, before any of them is built (design decision 6)."""
    check_settings(config)
    problems = [
        f"loss.{name}: settings ({', '.join(loss)}) of a loss that is not among those chosen: add it to loss=[...], or"
        f" drop them with '~loss.{name}'."
        for name, loss in config["loss"].items()
        if "_target_" not in loss
    ]
    for part, path in (*((config[part], part) for part in BOUND), (config["logging"]["loggers"], "logging.loggers")):
        try:
            validate(part, allow=config["allow"], path=path)
        except ConfigError as error:
            problems.append(as_written(str(error)))
    if problems:
        raise ConfigError("\n".join(problems))


def as_written(message: str) -> str:
    """`pd` refers to the losses and the ci function, which stand at the top of a config: name where to change them."""
    return message.replace("pd.losses.", "loss.").replace("pd.ci_fn", "ci_fn")


@contextmanager
def mistakes_of_the_user() -> Iterator[None]:
    """What a constructor refuses is a mistake in the config: say it, and the config path, instead of a traceback."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        raise ConfigError(as_written("\n".join([str(error), *getattr(error, "__notes__", [])]))) from error


@dataclass(frozen=True)
class Target:
    """The frozen network; `folder` of its weights where we trained it ourselves and can rebuild it."""

    model: nn.Module
    summary: dict[str, Any]
    folder: Path | None = None


def build_target(config: Config) -> Recipe | nn.Module:
    """What the config says the target is: a recipe to train one, or any network, frozen."""
    built = instantiate(config["target"], allow=config["allow"], path="target")
    if isinstance(built, Recipe):
        return replace(built, **changed(config, check=unchecked))
    if isinstance(built, nn.Module):
        return built.eval().requires_grad_(False)
    name = config["target"]["_target_"]
    raise ConfigError(f"target: expected a recipe or an nn.Module, {name} is a {type(built).__name__}.")


def changed(config: Config, *, check: Any) -> dict[str, Any]:
    """What the settings beside a recipe change in it, with `check` in the place of a check that is switched off."""
    steps = {} if config["target_steps"] is None else {"steps": config["target_steps"]}
    return steps if config["check_target"] else {**steps, "check": check}


def unchecked(model: nn.Module, data: LightningDataModule) -> CheckResult:
    return CheckResult(True, "NOT CHECKED (check_target=false): it may not be worth decomposing", {})


def make_target(config: Config, source: Recipe | nn.Module) -> Target:
    """The network itself: trained, or found in the cache."""
    if isinstance(source, nn.Module):
        loaded_from = {"loaded_from": source.loaded_from} if hasattr(source, "loaded_from") else {}
        return Target(source, {**loaded_from, "sha256": weights_sha256(source)})
    identity = without_downloads({**config["target"], **changed(config, check=None)})
    result = obtain_target(
        source, config=identity, cache_dir=config["cache_dir"], accelerator=config["runtime"]["accelerator"]
    )
    return Target(result.model, {**result.summary, "sha256": weights_sha256(result.model)}, result.folder)


def without_downloads(node: Any) -> Any:
    """A config without its `download` keys: whether something may be fetched decides nothing about what it is."""
    if isinstance(node, dict):
        return {key: without_downloads(value) for key, value in node.items() if key != "download"}
    return [without_downloads(value) for value in node] if isinstance(node, list) else node


def build_decomposition(config: Config, target: nn.Module) -> ParameterDecomposition:
    cast_weights(target, config["runtime"]["target_dtype"])
    try:
        decomposition = instantiate(config["pd"], allow=config["allow"], path="pd")(target=target)
    except (ValueError, TypeError) as error:
        if not isinstance(error, ConfigError) and not hasattr(error, "__notes__"):
            error.add_note(f"while building the config's pd ({config['pd']['_target_']})")
        raise
    decomposition.steps = config["steps"]
    return decomposition


def cast_weights(target: nn.Module, dtype: str | None) -> None:
    """The parameters of a target, in place. Its buffers stay: rotary angles are ruined by rounding."""
    if dtype is not None:
        for parameter in target.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(getattr(torch, dtype))


def build_data(config: Config) -> LightningDataModule:
    return instantiate(config["data"], allow=config["allow"], path="data")


def build_evaluation(config: Config, **arguments: Any) -> Evaluate:
    metrics: Mapping[str, Any] = instantiate(config["metric"], allow=config["allow"], path="metric")
    for speed in ("fast", "slow"):
        if speed not in metrics:
            raise ConfigError(f"metric.{speed} is missing: a config without such metrics says metric.{speed}={{}}.")
        for name, metric in metrics[speed].items():
            if not isinstance(metric, Evaluation | Loss):
                raise ConfigError(f"metric.{speed}.{name}: expected a metric with its _target_, got {metric!r:.200}")
    return Evaluate(
        metrics=metrics["fast"],
        slow_metrics=metrics["slow"],
        every=config["logging"]["eval_every"],
        slow_every=config["logging"]["slow_eval_every"],
        **arguments,
    )
