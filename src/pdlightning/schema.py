"""The settings of a run that build nothing themselves: their names, types and ranges. Checked without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pdlightning.config import MISSING, ConfigError, instantiate, join

BUILT = ("target", "data", "pd", "metric", "loss", "ci_fn", "comparison")
"""The parts of a config that are trees of `_target_`; their schema is the constructors."""

ADDED: dict[str, Any] = {"init_from": None, "target_steps": None, "labels": None}
ADDED_TO_LOGGING: dict[str, Any] = {"checkpoints_kept": 2, "run_name": None, "group": None, "tags": [], "swept": {}}
ADDED_TO_RUNTIME = {
    "target_dtype": None,
    "nodes": 1,
    "strategy": "auto",
    "accumulate": 1,
    "checkpoint_activations": False,
}
"""Settings that runs stored before they existed do not have."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how a run computes (spec D1, class `runtime`).

    Args:
        accelerator, precision: as the lightning.Trainer takes them.
        devices: of each node, one rank on each.
        nodes: machines.
        strategy: how several ranks work together, or `auto`: DDP where there are several.
        target_dtype: of the weights of the frozen target, cast once; None: as it was made.
        compile: torch.compile the step; `graphs` replays it as CUDA graphs too, on one GPU. That is not measured yet.
        accumulate: batches whose gradients are averaged into one step.
        checkpoint_activations: of the ci function's transformers, computed a second time instead of kept; of a compiled
            step more than these.
        threads: of torch on the CPU, or None for its own choice.
        keep_memory: glibc keeps freed blocks.
    """

    accelerator: str
    devices: int
    precision: Literal["64-true", "32-true", "bf16-true", "bf16-mixed", "16-true", "16-mixed"]
    compile: bool | Literal["graphs"]
    threads: int | None
    keep_memory: bool
    target_dtype: Literal["float64", "float32", "bfloat16", "float16"] | None
    nodes: int
    strategy: Literal["auto", "ddp", "fsdp"]
    accumulate: int
    checkpoint_activations: bool

    def __post_init__(self) -> None:
        at_least_one(self, "devices", "nodes", "accumulate", *(["threads"] if self.threads is not None else []))
        one_gpu = self.accelerator in ("gpu", "cuda") and self.devices * self.nodes * self.accumulate == 1
        if self.compile == "graphs" and not one_gpu:
            raise ValueError(
                "compile=graphs replays the step of one GPU: it needs runtime=gpu, one device, one node and accumulate"
                f" 1, got {self.accelerator}, {self.devices}, {self.nodes} and {self.accumulate}. compile=true works"
                " everywhere."
            )


@dataclass(frozen=True, kw_only=True)
class Logging:
    """When a run looks at itself, and where it writes that down. Every cadence is a number of steps.

    Args:
        log_every: training losses and learning rates.
        eval_every: the metrics under `metric.fast`.
        slow_eval_every: those under `metric.slow`; a multiple of `eval_every`.
        checkpoint_every: checkpoints to resume from.
        checkpoints_kept: the newest so many, at least two in case the newest is damaged; None: all.
        progress: show a progress bar.
        loggers: name -> logger beside metrics.csv.
        run_name, group, tags: of the run in loggers and tables; None and none: those of `naming`.
        swept: setting -> value, filled in by a sweep.
    """

    log_every: int
    eval_every: int
    slow_eval_every: int
    checkpoint_every: int
    checkpoints_kept: int | None
    progress: bool
    loggers: dict[str, Any]
    run_name: str | None
    group: str | None
    tags: list[str]
    swept: dict[str, Any]

    def __post_init__(self) -> None:
        at_least_one(self, "log_every", "eval_every", "slow_eval_every", "checkpoint_every")
        if self.checkpoints_kept is not None and self.checkpoints_kept < 2:
            raise ValueError(f"checkpoints_kept must be at least 2, or null for all, got {self.checkpoints_kept}.")
        check_multiple(eval_every=self.eval_every, slow_eval_every=self.slow_eval_every)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What else a config says.

    Args:
        name: of the experiment.
        seed: of the decomposition.
        steps: of the decomposition.
        init_from: the run whose V, U and ci function this one starts with, named as for `load_run`, or None.
        only: "target" stops when the target is there.
        cache_dir: of trained targets, or None.
        target_steps: in the place of those in the recipe of the target, or None.
        check_target: refuse a target that dropped features.
        allow: further packages that `_target_` may name.
        goal: logged name -> {min, max}.
        objective: logged name of the number a run returns to a sweep.
        labels: what the run is in the words of its user, name -> value; computes nothing.
    """

    name: str
    seed: int
    steps: int
    only: Literal["target"] | None
    cache_dir: str | None
    check_target: bool
    allow: list[str]
    goal: dict[str, dict[str, float]]
    objective: str
    init_from: str | None
    target_steps: int | None
    labels: dict[str, str | int | float | bool] | None

    def __post_init__(self) -> None:
        at_least_one(self, "steps", *(["target_steps"] if self.target_steps is not None else []))
        for name, bounds in self.goal.items():
            if not bounds or not bounds.keys() <= {"min", "max"}:
                raise ValueError(f"goal.{name}: expected min, max or both, got {bounds}.")


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what its version of the project did not know yet, as it was then."""
    added = {"runtime": ADDED_TO_RUNTIME, "logging": ADDED_TO_LOGGING}
    parts = {name: {**new, **config[name]} for name, new in added.items() if isinstance(config.get(name), Mapping)}
    return {**ADDED, **config, **parts}


def at_least_one(settings: Any, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}.")


def check_multiple(*, eval_every: int, slow_eval_every: int) -> None:
    """A slow evaluation is an ordinary one with more in it, so it can only come where there is one."""
    if slow_eval_every % eval_every:
        raise ValueError(
            f"slow_eval_every must be a multiple of eval_every, got {slow_eval_every} and {eval_every}: "
            f"{max(1, slow_eval_every // eval_every) * eval_every} would fit."
        )


def check_settings(config: Mapping[str, Any]) -> None:
    """Raise a `ConfigError` that lists what is wrong with the settings of a resolved config."""
    groups = (*BUILT, "runtime", "logging")
    problems = [_not_a_group(config, part) for part in groups if not isinstance(config.get(part), Mapping)]
    if problems:
        raise ConfigError("\n".join(problems))
    rest = {key: value for key, value in config.items() if key not in groups}
    for schema, path, settings in (
        (Run, "", rest),
        (Runtime, "runtime", config["runtime"]),
        (Logging, "logging", _without_loggers(config["logging"])),
    ):
        try:
            instantiate({"_target_": f"{__name__}.{schema.__name__}", **settings}, path=path)
        except ConfigError as error:
            problems.append(str(error))
        except ValueError as error:
            problems.append(join(path, str(error)))
    if problems:
        raise ConfigError("\n".join(problems))


def _without_loggers(logging: Mapping[str, Any]) -> dict[str, Any]:
    """The loggers are bound to their constructors later, with the other parts that are built."""
    loggers = logging.get("loggers")
    return {**logging, **({"loggers": dict.fromkeys(loggers)} if isinstance(loggers, dict) else {})}


def _not_a_group(config: Mapping[str, Any], part: str) -> str:
    if part not in config or config[part] == MISSING:
        return f"{part}: a value is required; choose {part}=... (--help lists them), or an experiment that has one"
    return f"{part}: expected a group of settings, got {config[part]!r}"
