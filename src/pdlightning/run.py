"""One run, from a resolved config to a folder of results: the only place where everything meets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch.strategies import DDPStrategy, Strategy

from pdlightning.build import (
    Config,
    Target,
    build_data,
    build_decomposition,
    build_evaluation,
    build_target,
    make_target,
    mistakes_of_the_user,
    validate_config,
)
from pdlightning.callbacks import RunCheckpoint, StepProgress, Throughput
from pdlightning.checkpoints import AtomicCheckpointIO, checkpoint_step, latest_checkpoint
from pdlightning.config import ConfigError, instantiate
from pdlightning.finetune import start_of
from pdlightning.loading import export_decomposition
from pdlightning.loggers import MetricsCSV
from pdlightning.metrics.evaluation import Data, Page
from pdlightning.naming import named
from pdlightning.ranks import first_rank_first, rank
from pdlightning.rehearsal.rehearse import rehearse
from pdlightning.report.build import REPORT, report_afterwards
from pdlightning.results import goals_met, result_table
from pdlightning.resume import CONFIG, SUMMARY
from pdlightning.runtime import prepare_runtime
from pdlightning.schema import complete
from pdlightning.sharding import ShardedStrategy
from pdlightning.storage import (
    StorageError,
    atomic_write,
    atomic_write_json,
    atomic_write_text,
    run_environment,
    uncommitted_changes,
)
from pdlightning.tracking import tracked

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FigureFolder:
    """Writes a figure as `<name>.png`, a page as `<name>.html`, data as `<name>.json`; the latest of a name stays."""

    folder: Path

    def __call__(self, name: str, figure: Figure | Page | Data, step: int) -> None:
        path = self.folder / name.removeprefix("eval/").replace("/", "_")
        if isinstance(figure, Page):
            atomic_write_text(f"{path}.html", figure)
        elif isinstance(figure, Data):
            atomic_write_text(f"{path}.json", json.dumps({"step": step, **figure}))
        else:
            atomic_write(f"{path}.png", lambda file: figure.savefig(file, format="png"))


def run(config: Config, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train the target, decompose it, evaluate, export; returns the content of `summary.json`.

    Args:
        config: resolved, plain.
        folder: of the run; everything is written there.
        resume: go on from the newest complete checkpoint in `folder`.

    Raises:
        ConfigError: before the target is trained, wherever the mistake can be known by then.
    """
    config = complete(config)
    validate_config(config)
    saving = build_checkpoints(config, folder)
    checkpoint = latest_checkpoint(folder) if resume else None
    first_step = 0 if checkpoint is None else checkpoint_step(checkpoint)
    prepare_runtime(config["runtime"])
    with mistakes_of_the_user():
        data = build_data(config)
        evaluation = build_evaluation(config, save_figure=FigureFolder(folder / "figures"))
        throughput = Throughput()
        # Its clock must not run while the others work; a checkpoint of a step follows the numbers of that step.
        trainer = build_trainer(config, folder, [throughput, evaluation, saving], first_step=first_step)
        source = build_target(config)
        start = start_of(config) if checkpoint is None else None  # a checkpoint has gone on from there
        sizes = rehearse(config, source, start)
    throughput.flops = None if sizes.step is None else sizes.step.flops

    first = rank() == 0
    own_loggers = trainer.loggers if first else []
    with owned(folder, resume=resume) if first else nullcontext(), tracked(own_loggers, folder, config):
        if first:
            write_origin(folder, config)
        with mistakes_of_the_user():
            with first_rank_first():
                target = make_target(config, source)
            decomposition = build_decomposition(config, target.model)
        if start is not None:
            start.apply(decomposition, target)

        going_on = f", from step {first_step}" if first_step else ""
        rank_zero_info(f"Decomposing {config['name']} in {folder}{going_on}\n{sizes.table()}")
        training_started = time.perf_counter()
        trainer.fit(decomposition, datamodule=data, ckpt_path=checkpoint)
        if evaluation.latest_step < config["steps"]:  # resumed after the last step, which was not exported
            evaluation.measure_again(decomposition, data.val_dataloader(), step=config["steps"])
        seconds = time.perf_counter() - training_started

        summary = {
            **outcome(config, target, evaluation.latest),
            "seconds": round(saving.seconds, 2),
            "steps_per_second": round((config["steps"] - first_step) / seconds, 2),
        }
        state = decomposition.whole_state_dict()
        if first:
            export_decomposition(folder, decomposition, state, config=config, target=target, summary=summary)
            atomic_write_json(folder / SUMMARY, summary)
            report_afterwards(folder)
    rank_zero_info(last_words(config, folder, summary))
    return summary


def last_words(config: Config, folder: Path, summary: dict[str, Any]) -> str:
    """The result in words, and where all of it is."""
    written = [*folder.glob(REPORT), *sorted((folder / "figures").glob("*.html"))]
    pages = [f"To read in a browser: {page}" for page in written]
    return "\n".join([result_table(summary, config), f"Everything of this run is in {folder}", *pages])


def outcome(config: Config, target: Target, metrics: dict[str, float]) -> dict[str, Any]:
    """What summary.json says of a run, but for the time it took."""
    return {
        "experiment": config["name"],
        **named(config),
        "steps": config["steps"],
        "solved": goals_met(config["goal"], metrics),
        "init_from": config["init_from"],
        "target": target.summary,
        "metrics": metrics,
    }


def write_origin(folder: Path, config: Config) -> None:
    """What makes a run again: its config, versions and commit, and what was not committed."""
    atomic_write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    atomic_write_json(folder / "environment.json", run_environment())
    if (changes := uncommitted_changes()) is not None:
        atomic_write_text(folder / "code.diff", changes)


def target_alone(config: Config) -> Target:
    """Train the target of a config, or find it in the cache; says where its weights and figures are."""
    config = complete(config)
    validate_config(config)
    prepare_runtime(config["runtime"])
    with mistakes_of_the_user():
        target = make_target(config, build_target(config))
    rank_zero_info(f"Weights, record and figures of the target are in {target.folder}")
    return target


@contextmanager
def owned(folder: Path, *, resume: bool) -> Iterator[None]:
    """One process at a time works on a run, and a new run never overwrites an old one."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".running", timeout=0)
    try:
        with lock:
            if not resume and (folder / CONFIG).exists():
                raise ConfigError(
                    f"{folder} already holds a run. Go on with it by resume={folder}, or choose another folder with "
                    "hydra.run.dir=..."
                )
            yield
    except Timeout as error:
        raise StorageError(f"{folder} belongs to a run that is going on in another process. Stop it first.") from error
    finally:
        if not lock.is_locked:
            (folder / ".running").unlink(missing_ok=True)


def cluster() -> list[ClusterEnvironment]:
    """SLURM, where it has started us; what its signals mean is the business of `RunCheckpoint`."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def build_strategy(runtime: dict[str, Any]) -> Strategy | str:
    if runtime["devices"] * runtime["nodes"] == 1:
        return "auto"
    if runtime["strategy"] == "fsdp":
        return ShardedStrategy()
    return DDPStrategy(init_sync=False, gradient_as_bucket_view=True)  # all ranks make the same parameters by key


def build_checkpoints(config: Config, folder: Path) -> RunCheckpoint:
    logging = config["logging"]
    return RunCheckpoint(
        folder=folder / "checkpoints",
        every=logging["checkpoint_every"],
        kept=logging["checkpoints_kept"],
        config=config,
    )


def build_trainer(config: Config, folder: Path, callbacks: list[Callback], *, first_step: int) -> Trainer:
    """The Trainer of a run with these callbacks in their order, the loggers and the progress of its config."""
    logging, runtime = config["logging"], config["runtime"]
    loggers = instantiate(logging["loggers"], allow=config["allow"], path="logging.loggers")
    return Trainer(
        max_steps=config["steps"],
        accelerator=runtime["accelerator"],
        devices=runtime["devices"],
        num_nodes=runtime["nodes"],
        strategy=build_strategy(runtime),
        accumulate_grad_batches=runtime["accumulate"],
        precision=runtime["precision"],
        logger=[
            MetricsCSV(path=folder / "metrics.csv", first_step=first_step),
            *(logger(save_dir=str(folder)) for logger in loggers.values()),
        ],
        callbacks=[*callbacks, *([StepProgress()] if logging["progress"] else [])],
        plugins=[AtomicCheckpointIO(), *cluster()],
        log_every_n_steps=logging["log_every"],
        enable_progress_bar=logging["progress"],
        enable_model_summary=False,
        enable_checkpointing=True,
        inference_mode=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
