"""One job of a sweep: its name and folder, and what is left to do in it. A failing job does not end its sweep."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from omegaconf import DictConfig

from pdlightning.commands import objective, plain_config, remove_if_empty, run_config, sentence_of
from pdlightning.config import ConfigError
from pdlightning.naming import folder_name, run_name
from pdlightning.resume import CONFIG, ERROR, LOCK, LOG, SEARCHES, SUMMARY, SWEEP, has_checkpoint, same_computation
from pdlightning.schema import complete


class JobElsewhere(RuntimeError):
    """Another process works on this job, whose folder is then not ours to touch."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one job of a sweep is to do.

    Attributes:
        number: its place in the sweep, from 0.
        of: how many jobs the sweep has.
        swept: setting -> value, of the settings that the sweep changes.
        config: of its run, plain.
        folder: of its run.
        search: the direction of the search that waits for its objective; None of a sweep of given values.
    """

    number: int
    of: int
    swept: dict[str, Any]
    config: dict[str, Any]
    folder: Path
    search: str | None

    @property
    def title(self) -> str:
        return f"Job {self.number + 1} of {self.of}" + (f": {run_name(self.swept)}" if self.swept else "")


def job_of(config: DictConfig, hydra: Any) -> Job:
    """The job of a composed config, `hydra` being Hydra's part of it."""
    place = Path(hydra.runtime.output_dir)
    record = yaml.safe_load((place.parent / SWEEP).read_text())
    swept = swept_values(list(hydra.overrides.task), record["swept"])
    plain = {**plain_config(config), "resume": None}  # what is there in its folder decides
    plain["logging"] = {
        **plain["logging"],
        "swept": swept,
        "run_name": plain["logging"]["run_name"] or run_name(swept) or None,
        "group": plain["logging"]["group"] or place.parent.name,
    }
    numbered = place.name == str(hydra.job.num)  # else the user has named the folders
    return Job(
        number=int(hydra.job.num),
        of=record["jobs"],
        swept=swept,
        config=plain,
        folder=place.with_name(folder_name(hydra.job.num, swept)) if numbered else place,
        search=hydra.sweeper.direction if hydra.sweeper._target_.startswith(SEARCHES) else None,
    )


def swept_values(overrides: list[str], swept: list[str]) -> dict[str, Any]:
    """setting -> value, of those overrides of a job that the sweep varies, in the order of `swept`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    values = {
        override.key_or_group: override.value() for override in OverridesParser.create().parse_overrides(overrides)
    }
    return {key: values[key] for key in swept}


def job_from_hydra(config: DictConfig, hydra: Any) -> float:
    """What Hydra calls for each job; returns the objective, nan where the job failed."""
    job = job_of(config, hydra)
    remove_if_empty(Path(hydra.runtime.output_dir))  # Hydra makes one by its own name
    value = done_before(job)
    if value is None:
        print(f"\n{job.title}", flush=True)
        value = run_job(job)
    return told(job, value)


def told(job: Job, value: float) -> float:
    """The objective as the sweeper takes it. To a search a job without one is as bad as can be: it looks elsewhere."""
    if job.search is None or not math.isnan(value):
        return value
    return -math.inf if job.search == "maximize" else math.inf


def done_before(job: Job) -> float | None:
    """The objective of a job that has finished before; None where there is something left to do. Needs no torch."""
    summary = summary_in(job.folder)
    stored = config_in(job.folder)
    if summary is None or stored is None or not same_computation(stored, job.config):
        return None
    try:
        value = objective(job.config, summary)
    except ConfigError as error:
        fail(job, str(error))
        return math.nan
    print(f"{job.title} has finished before.", flush=True)
    return value


def config_in(folder: Path) -> dict[str, Any] | None:
    """The config of the run in a folder; None where there is none, or a damaged one."""
    try:
        stored = yaml.safe_load((folder / CONFIG).read_text())
    except (FileNotFoundError, yaml.YAMLError):
        return None
    return complete(stored) if isinstance(stored, dict) else None


def summary_in(folder: Path) -> dict[str, Any] | None:
    """The summary of the run in a folder; None where it has not finished, or the file is damaged."""
    try:
        summary = json.loads((folder / SUMMARY).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return summary if isinstance(summary, dict) and "metrics" in summary else None


def run_job(job: Job) -> float:
    """Do what is left of a job; returns the objective, or nan, with the reason in its `error.txt`.

    Raises:
        SystemExit: it was stopped on purpose; the message says how to go on with the sweep.
    """
    go_on = f"Go on with:\n  python -m pdlightning resume={job.folder.parent}"
    try:
        resume = prepare(job)
        return run_config(job.config, job.folder, resume=resume)
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. {go_on}")
    except JobElsewhere as error:
        print(f"{job.title}: {error}", file=sys.stderr)
        return math.nan
    except Exception as error:
        from pdlightning.callbacks import Interrupted

        if isinstance(error, Interrupted):
            sys.exit(f"{str(error).splitlines()[0].split(' Go on')[0]} {go_on}")
        sentence = sentence_of(error) or traceback.format_exc()
        fail(job, sentence)
        return math.nan


def fail(job: Job, sentence: str) -> None:
    """Say and keep why a job has failed."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / ERROR).write_text(sentence.rstrip() + "\n")
    print(f"{job.title} failed: {sentence}", file=sys.stderr)


def prepare(job: Job) -> bool:
    """Make the folder ready: what an earlier attempt has left is removed, or there is a checkpoint to go on from.

    Returns whether there is.
    """
    stored = config_in(job.folder)
    if stored is not None and not same_computation(stored, job.config):
        raise ConfigError(
            f"{job.folder} holds a run of other settings than this job's: move it away, or choose another folder for "
            "the sweep by hydra.sweep.dir=..."
        )
    resume = stored is not None and has_checkpoint(job.folder)
    if job.folder.is_dir() and number_among_ranks() == 0:
        try:
            with FileLock(job.folder / LOCK, timeout=0):
                clear(job.folder, checkpoints=not resume)
        except Timeout as error:
            raise JobElsewhere(f"another process works in {job.folder}, which is left alone.") from error
    return resume


def number_among_ranks() -> int:
    """Of this process, where torchrun or srun has started one for each rank."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def clear(folder: Path, *, checkpoints: bool) -> None:
    """Remove how an earlier attempt ended; with its `checkpoints` also all the rest but what it has said."""
    from pdlightning.storage import remove

    gone = (
        [path for path in folder.iterdir() if path.name != LOG] if checkpoints else [folder / ERROR, folder / SUMMARY]
    )
    for path in gone:
        remove(path)
    (folder / LOCK).unlink(missing_ok=True)
