"""A rehearsal before the long work: everything put together once, around an untrained target and one batch."""

from __future__ import annotations

import torch
from torch import nn

from pdlightning.build import Config, build_data, build_decomposition, build_evaluation
from pdlightning.config import ConfigError, suggest
from pdlightning.metrics.evaluation import Evaluation
from pdlightning.observation import observe
from pdlightning.targets import TargetRecipe


def rehearse(config: Config, source: TargetRecipe | nn.Module) -> None:
    """Put everything together around an untrained target, and show it one batch: mistakes come before the long work."""
    if isinstance(source, TargetRecipe):
        target = source.blank(source.seed)
        try:
            source.data(seed=source.seed)
        except (ValueError, TypeError) as error:
            error.add_note("while building the config's target.data")
            raise
    else:
        target = source
    decomposition = build_decomposition(config, target)
    evaluation = build_evaluation(config)
    evaluation.prepare(decomposition)
    decomposition.set_progress(0)
    batch = next(iter(build_data(config).val_dataloader()))
    step = torch.tensor(-1, dtype=torch.int32)
    quick = {name: metric for name, metric in evaluation.metrics.items() if isinstance(metric, Evaluation)}
    measured = {f"eval/loss/{name}" for name in (*decomposition.terms, "total")}
    measured |= {f"eval/{name}" for name, metric in evaluation.metrics.items() if name not in quick}
    with torch.no_grad():
        try:
            seen = observe(decomposition.model, batch, seed=config["seed"], step=step, training=False, outputs=True)
        except (RuntimeError, IndexError) as error:
            name = config["data"]["_target_"]
            raise ConfigError(f"data: the target cannot take a batch of {name}: {error}") from error
        if not seen.clean.output.isfinite().all():
            raise ConfigError("data: the target's output for the first evaluation batch is not finite.")
        for name, metric in quick.items():
            try:
                metric.update(seen)
                measured |= {f"eval/{name}/{part}" if part else f"eval/{name}" for part in metric.compute()}
            except Exception as error:
                error.add_note(f"while trying out metric.fast.{name}")
                raise
    decomposition.model.restore()
    check_objective(config["objective"], measured, later=list(evaluation.slow_metrics))


def check_objective(objective: str, measured: set[str], *, later: list[str]) -> None:
    """The number that a run returns must be one that its evaluation gives; what slow metrics give is not known yet."""
    if objective not in measured and not any(objective.startswith(f"eval/{name}") for name in later):
        raise ConfigError(
            f"objective: {objective!r} is not measured by this run{suggest(objective, measured) or '.'}"
            f" It measures {', '.join(sorted(measured))}" + (f", and what {', '.join(later)} gives." if later else ".")
        )
