"""One run, from a resolved config to a folder of results: the only place where everything meets."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info

from pdlightning.build import (
    Config,
    build_data,
    build_decomposition,
    build_evaluation,
    build_target,
    validate_config,
)
from pdlightning.callbacks import RunCheckpoint, StepProgress
from pdlightning.config import instantiate
from pdlightning.loggers import MetricsCSV
from pdlightning.report import goals_met, result_table
from pdlightning.resume import CONFIG, SUMMARY
from pdlightning.runs import export_decomposition
from pdlightning.runtime import prepare_runtime
from pdlightning.storage import (
    AtomicCheckpointIO,
    atomic_write,
    atomic_write_json,
    atomic_write_text,
    latest_checkpoint,
    run_environment,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FigureFolder:
    """Writes each figure as `<name>.png`; a later one of the same name takes its place."""

    folder: Path

    def __call__(self, name: str, figure: Figure, step: int) -> None:
        path = self.folder / f"{name.removeprefix('eval/').replace('/', '_')}.png"
        atomic_write(path, lambda file: figure.savefig(file, format="png"))


def run(config: Config, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train the target, decompose it, evaluate, export; returns the content of `summary.json`.

    Args:
        config: resolved, plain.
        folder: of the run; everything is written there.
        resume: go on from the newest complete checkpoint in `folder`.
    """
    validate_config(config)
    checkpoint = latest_checkpoint(folder) if resume else None
    prepare_runtime(config["runtime"])
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    atomic_write_json(folder / "environment.json", run_environment())

    started = time.perf_counter()
    data = build_data(config)
    target = build_target(config)
    decomposition = build_decomposition(config, target.model)
    evaluation = build_evaluation(config, save_figure=FigureFolder(folder / "figures"))
    trainer = build_trainer(config, folder, evaluation, first_step=step_of(checkpoint))

    rank_zero_info(f"Decomposing {config['name']} in {folder}")
    training_started = time.perf_counter()
    trainer.fit(decomposition, datamodule=data, ckpt_path=checkpoint)
    if trainer.global_step < config["steps"]:
        raise Interrupted(f"Stopped at step {trainer.global_step} of {config['steps']}. Go on with: resume={folder}")
    seconds = time.perf_counter() - training_started

    summary = {
        "experiment": config["name"],
        "steps": config["steps"],
        "seconds": round(time.perf_counter() - started, 2),
        "steps_per_second": round((config["steps"] - step_of(checkpoint)) / seconds, 2),
        "solved": goals_met(config["goal"], evaluation.latest),
        "target": target.summary,
        "metrics": evaluation.latest,
    }
    export_decomposition(folder, decomposition, config=config, target=target, summary=summary)
    atomic_write_json(folder / SUMMARY, summary)
    rank_zero_info(result_table(summary, config["goal"]))
    rank_zero_info(f"Everything of this run is in {folder}")
    return summary


class Interrupted(RuntimeError):
    """The training was stopped on purpose before its end; the message says how to go on."""


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.stem.removeprefix("step="))


def build_trainer(config: Config, folder: Path, evaluation: Any, *, first_step: int) -> Trainer:
    logging, runtime = config["logging"], config["runtime"]
    loggers = instantiate(logging["loggers"], allow=config["allow"], path="logging.loggers")
    callbacks = [
        evaluation,
        # After the evaluation, so that a checkpoint of a step follows the numbers of that step.
        RunCheckpoint(folder=folder / "checkpoints", every=logging["checkpoint_every"], config=config),
        *([StepProgress()] if logging["progress"] else []),
    ]
    return Trainer(
        max_steps=config["steps"],
        accelerator=runtime["accelerator"],
        devices=runtime["devices"],
        precision=runtime["precision"],
        logger=[
            MetricsCSV(path=folder / "metrics.csv", first_step=first_step),
            *(logger(save_dir=str(folder)) for logger in loggers.values()),
        ],
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=logging["log_every"],
        enable_progress_bar=logging["progress"],
        enable_model_summary=False,
        enable_checkpointing=True,
        inference_mode=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )

