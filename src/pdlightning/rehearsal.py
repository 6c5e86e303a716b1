"""A rehearsal before the long work: everything put together once, around an untrained target and one batch."""

from __future__ import annotations

import torch
from lightning import LightningDataModule
from torch import nn

from pdlightning.build import Config, build_data, build_decomposition, build_evaluation
from pdlightning.config import ConfigError, suggest
from pdlightning.data import Tokens, check_context, check_vocabulary
from pdlightning.finetune import Start
from pdlightning.metrics.evaluation import Evaluation
from pdlightning.observation import observe
from pdlightning.targets import Recipe


def rehearse(config: Config, source: Recipe | nn.Module, start: Start | None) -> None:
    """Put everything together around an untrained target, and show it one batch: mistakes come before the long work.

    `start` is what the decomposition starts with instead of its own initial state.
    """
    if isinstance(source, Recipe):
        target = source.blank(source.seed)
        try:
            source.data(seed=source.seed)
        except (ValueError, TypeError) as error:
            error.add_note("while building the config's target.data")
            raise
    else:
        target = source
    decomposition = build_decomposition(config, target)
    if start is not None:
        start.check(decomposition, config)
    evaluation = build_evaluation(config)
    evaluation.prepare(decomposition)
    decomposition.set_progress(0)
    data = build_data(config)
    check_tokens(data, target)
    batch = next(iter(data.val_dataloader()))
    step = torch.tensor(-1, dtype=torch.int32)
    quick = {name: metric for name, metric in evaluation.metrics.items() if isinstance(metric, Evaluation)}
    checked = {
        f"{part}.{name}": metric
        for part, metrics in (
            ("loss", decomposition.terms),
            ("metric.fast", evaluation.metrics),
            ("metric.slow", evaluation.slow_metrics),
        )
        for name, metric in metrics.items()
    }
    measured = {f"eval/loss/{name}" for name in (*decomposition.terms, "total")}
    measured |= {f"eval/{name}" for name, metric in evaluation.metrics.items() if name not in quick}
    size, runtime = getattr(data, "batch_size", None), config["runtime"]
    for name, loss in decomposition.terms.items():
        try:
            loss.check_training(micro_batches=1, loss_scaled=runtime["precision"] == "16-mixed")
            if isinstance(size, int):
                loss.check_batch(size // runtime["devices"])
        except ValueError as error:
            raise ConfigError(f"loss.{name}: {error}") from error
    with torch.no_grad():
        try:
            seen = observe(decomposition.model, batch, seed=config["seed"], step=step, training=False, outputs=True)
        except (RuntimeError, IndexError) as error:
            name = config["data"]["_target_"]
            raise ConfigError(f"data: the target cannot take a batch of {name}: {error}") from error
        if not seen.clean.output.isfinite().all():
            raise ConfigError("data: the target's output for the first evaluation batch is not finite.")
        for path, metric in checked.items():
            try:
                metric.check(seen)
            except ValueError as error:
                raise ConfigError(f"{path}: {error}") from error
        for name, metric in quick.items():
            try:
                metric.update(seen)
                measured |= {f"eval/{name}/{part}" if part else f"eval/{name}" for part in metric.compute()}
            except Exception as error:
                error.add_note(f"while trying out metric.fast.{name}")
                raise
    decomposition.model.restore()
    check_objective(config["objective"], measured, later=list(evaluation.slow_metrics))


def check_tokens(data: LightningDataModule, target: nn.Module) -> None:
    """Tokens must be those of the model, in rows it can take; what the target does not say of itself is not checked."""
    if not isinstance(data, Tokens):
        return
    known = getattr(target, "config", target)  # of transformers, or one of ours
    if isinstance(vocabulary := getattr(known, "vocab_size", None), int):
        check_vocabulary(data, vocabulary)
    context = getattr(known, "max_position_embeddings", None) or getattr(known, "n_ctx", None)
    if isinstance(context, int):
        check_context(data, context)


def check_objective(objective: str, measured: set[str], *, later: list[str]) -> None:
    """The number that a run returns must be one that its evaluation gives; what slow metrics give is not known yet."""
    if objective not in measured and not any(objective.startswith(f"eval/{name}") for name in later):
        raise ConfigError(
            f"objective: {objective!r} is not measured by this run{suggest(objective, measured) or '.'}"
            f" It measures {', '.join(sorted(measured))}" + (f", and what {', '.join(later)} gives." if later else ".")
        )
