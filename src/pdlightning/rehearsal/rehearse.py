"""A rehearsal before the long work: everything put together once, around an untrained target and one batch."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningDataModule
from torch import nn

from pdlightning.build import Config, build_data, build_decomposition, build_evaluation
from pdlightning.callbacks import Evaluate
from pdlightning.config import ConfigError, suggest
from pdlightning.data import Tokens, check_context, check_vocabulary
from pdlightning.decomposition import ParameterDecomposition
from pdlightning.finetune import Start
from pdlightning.metrics.evaluation import Evaluation
from pdlightning.observation import observe
from pdlightning.rehearsal.sizes import Sizes, check_components, shards_of, sizes_of
from pdlightning.runtime import mixed_precision
from pdlightning.targets import Recipe


def rehearse(config: Config, source: Recipe | nn.Module, start: Start | None) -> Sizes:
    """Put everything together around an untrained target, and show it one batch: mistakes come before the long work.

    `start` is what the decomposition starts with instead of its own initial state. Returns what the run will need.
    """
    target, runtime = blank_target(source), config["runtime"]
    check_components(target, config["pd"]["sites"], runtime)
    decomposition = build_decomposition(config, target)
    if start is not None:
        start.check(decomposition, config)
    evaluation = build_evaluation(config)
    evaluation.prepare(decomposition)
    decomposition.set_progress(0)
    data = build_data(config)
    check_tokens(data, target)
    batch_size = getattr(data, "batch_size", None)
    check_losses(config, decomposition, batch_size=batch_size)
    batch = next(iter(data.val_dataloader()))
    ranks, precision = runtime["devices"] * runtime["nodes"], runtime["precision"]
    sizes = sizes_of(
        decomposition,
        batch,
        precision=precision,
        samples=batch_size // ranks if isinstance(batch_size, int) else None,
        shards=shards_of(runtime),
        gradients_kept=ranks > 1 or runtime["accumulate"] > 1,  # in the buckets of DistributedDataParallel
    )
    sizes.check(runtime)
    with mixed_precision(precision, torch.device("cpu")):
        measured = try_out(config, decomposition, evaluation, batch)
    decomposition.model.restore()
    check_objective(config["objective"], measured, later=list(evaluation.slow_metrics))
    return sizes


def blank_target(source: Recipe | nn.Module) -> nn.Module:
    """The target without its training; a recipe's own data is built too."""
    if not isinstance(source, Recipe):
        return source
    target = source.blank(source.seed)
    try:
        source.data(seed=source.seed)
    except (ValueError, TypeError) as error:
        error.add_note("while building the config's target.data")
        raise
    return target


def check_losses(config: Config, decomposition: ParameterDecomposition, *, batch_size: int | None) -> None:
    """What a loss refuses of the batches and of the precision."""
    runtime = config["runtime"]
    ranks = runtime["devices"] * runtime["nodes"]
    if isinstance(batch_size, int) and batch_size % ranks:
        raise ConfigError(
            f"data.batch_size={batch_size} cannot be split evenly over {ranks} ranks (runtime.devices="
            f"{runtime['devices']}, runtime.nodes={runtime['nodes']}): choose a multiple of {ranks}."
        )
    for name, loss in decomposition.terms.items():
        try:
            loss.check_training(micro_batches=runtime["accumulate"], loss_scaled=runtime["precision"] == "16-mixed")
            if isinstance(batch_size, int):
                loss.check_batch(batch_size // ranks)
        except ValueError as error:
            raise ConfigError(f"loss.{name}: {error}") from error


@torch.no_grad()
def try_out(config: Config, decomposition: ParameterDecomposition, evaluation: Evaluate, batch: Any) -> set[str]:
    """Show one batch to everything that would look at it; the names of the values that a run will have."""
    step = torch.tensor(-1, dtype=torch.int32)
    try:
        seen = observe(decomposition.model, batch, seed=config["seed"], step=step, training=False, outputs=True)
    except (RuntimeError, IndexError) as error:
        name = config["data"]["_target_"]
        raise ConfigError(f"data: the target cannot take a batch of {name}: {error}") from error
    if not seen.clean.output.isfinite().all():
        raise ConfigError("data: the target's output for the first evaluation batch is not finite.")
    groups = {"loss": decomposition.terms, "metric.fast": evaluation.metrics, "metric.slow": evaluation.slow_metrics}
    for group, metrics in groups.items():
        for name, metric in metrics.items():
            try:
                metric.check(seen)
            except ValueError as error:
                raise ConfigError(f"{group}.{name}: {error}") from error
    measured = {f"eval/loss/{name}" for name in (*decomposition.terms, "total")}
    for name, metric in evaluation.metrics.items():
        if not isinstance(metric, Evaluation):
            measured.add(f"eval/{name}")
            continue
        try:
            metric.update(seen)
            measured |= {f"eval/{name}/{part}" if part else f"eval/{name}" for part in metric.compute()}
        except Exception as error:
            error.add_note(f"while trying out metric.fast.{name}")
            raise
    return measured


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
