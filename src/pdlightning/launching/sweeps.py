"""Around a sweep: what it varies is checked and kept before the first job, so that it can go on; a table ends it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from pdlightning.config import ConfigError
from pdlightning.launching.axes import check_jobs, is_search, jobs_of, varied
from pdlightning.resume import LOCK, SWEEP

if TYPE_CHECKING:
    from pdlightning.catalogue import Run

TABLE = "runs.csv"
WHERE = ("launcher=", "hydra/launcher=", "hydra.launcher.", "runtime=", "runtime.", "logging.progress=")
"""Words that say where the jobs run: they may change when a sweep goes on."""
FLAGS = ("-m", "--multirun")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The content of `sweep.yaml`.

    Attributes:
        arguments: of the command that started it.
        started_in: the folder from which it was started.
        swept: the settings that it varies.
        jobs: how many it has.
    """

    arguments: list[str]
    started_in: str
    swept: list[str]
    jobs: int


class AroundSweep(Callback):
    """Refuses a sweep that cannot work before its first job, and prints its table after the last."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Hydra turns what a callback raises into a warning, but for SystemExit.
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        arguments = sys.argv[1:]
        try:
            self.lock = begin(config, arguments)
        except ConfigError as error:
            sys.exit(str(error))
        except (HydraException, OmegaConfBaseException) as error:
            from hydra.core.global_hydra import GlobalHydra

            from pdlightning.__main__ import CONF
            from pdlightning.launching.overrides import explain_refusal

            GlobalHydra.instance().clear()  # to explain is to compose parts of it again
            sys.exit(explain_refusal(error, arguments, CONF))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.lock.release()
        Path(self.lock.lock_file).unlink(missing_ok=True)
        if config.only != "target":
            searched = config.hydra.sweeper.get("direction")
            conclude(Path(config.hydra.sweep.dir), searched=searched, objective=config.objective)


def begin(config: DictConfig, arguments: Sequence[str]) -> FileLock:
    """Check every job, write `sweep.yaml`; returns the lock of the sweep, which is ours now.

    Raises:
        ConfigError: the jobs cannot be told apart, one of them is wrong, or the folder is that of another sweep.
    """
    axes = [override for override in varied(config) if override.is_sweep_override()]
    folder = Path(config.hydra.sweep.dir)
    if (jobs := config.hydra.launcher.get("jobs")) is not None and jobs < 1:
        raise ConfigError(f"hydra.launcher.jobs must be at least 1, got {jobs}.")
    check_jobs(config)
    check_folder(folder, arguments, go_on=config.resume == "auto")
    if is_search(config):
        import optuna

        optuna.logging.set_verbosity(logging.WARNING)  # every job has its line from us
    jobs = config.hydra.sweeper.n_trials if is_search(config) else len(jobs_of(config))
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(f"{folder} is a sweep that is going on in another process. Stop it first.") from error
    if not (folder / SWEEP).is_file():
        sweep = Sweep(
            arguments=list(arguments), started_in=os.getcwd(), swept=[axis.key_or_group for axis in axes], jobs=jobs
        )
        aside = folder / f".{SWEEP}.tmp"
        aside.write_text(yaml.safe_dump(asdict(sweep), sort_keys=False))
        aside.replace(folder / SWEEP)
    return lock


def conclude(folder: Path, *, searched: str | None, objective: str) -> None:
    """The table of a sweep, printed and as a file; exit code 1 where a job has no result that should have one.

    `searched` is the direction of a search, to which a failed job is an answer too.
    """
    from pdlightning.report.build import report_afterwards
    from pdlightning.runs import find_runs, share_lines, table, write_csv

    runs = find_runs([folder])
    write_csv(runs, folder / TABLE)
    best = [] if searched is None else best_line(runs, objective, searched)
    print("\n".join(["", f"sweep {folder}", *table(runs), *share_lines(runs), *best]))
    report_afterwards(folder)
    if searched is None and any(run.state != "finished" for run in runs):
        sys.exit(f"Some jobs of this sweep failed. Try these again with:\n  python -m pdlightning resume={folder}")


def best_line(runs: Sequence[Run], objective: str, direction: str) -> list[str]:
    measured = [run for run in runs if run.state == "finished" and objective in run.metrics]
    if not measured:
        return []
    best = (max if direction == "maximize" else min)(measured, key=lambda run: run.metrics[objective])
    return [f"best {objective}, {best.metrics[objective]:.4g}: {best.folder}"]


def check_folder(folder: Path, arguments: Sequence[str], *, go_on: bool) -> None:
    if not (folder / SWEEP).is_file():
        return
    if not go_on:
        raise ConfigError(
            f"{folder} already holds a sweep. Go on with it by resume={folder}, or choose another folder with "
            "hydra.sweep.dir=..."
        )
    here, there = what(arguments), what(read_sweep(folder).arguments)
    if here != there:
        raise ConfigError(
            f"{folder} holds another sweep ({' '.join(there)}). Choose another folder with hydra.sweep.dir=..., or go "
            f"on with that one by resume={folder}"
        )


def read_sweep(folder: Path) -> Sweep:
    try:
        return Sweep(**yaml.safe_load((folder / SWEEP).read_text()))
    except (TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{folder / SWEEP} is damaged: {error}") from error


def what(arguments: Sequence[str]) -> list[str]:
    """The words of a command that decide what is computed."""
    free = (*WHERE, "resume=", "hydra.sweep.dir=", *FLAGS)
    return sorted(word for word in arguments if not word.startswith(free))


def go_on_with_sweep(arguments: Sequence[str]) -> list[str]:
    """The words of a command, with those of the sweep in the place of `resume=SWEEP`, or of `-m resume=auto`.

    The words of a command that is about no sweep come back as they are.

    Raises:
        ConfigError: other words were changed than those that say where the jobs run.
    """
    chosen = [word.removeprefix("resume=") for word in arguments if word.startswith("resume=")]
    if not chosen or chosen[-1] in ("null", ""):
        return list(arguments)
    if chosen[-1] == "auto":
        folder = unfinished_sweep(arguments) if any(flag in arguments for flag in FLAGS) else None
        where = [word for word in arguments if word.startswith(WHERE)]
        return list(arguments) if folder is None else command_for(folder, where)
    folder = Path(chosen[-1].strip("'\"")).expanduser().absolute()
    if not (folder / SWEEP).is_file():
        return list(arguments)
    rest = [word for word in arguments if not word.startswith("resume=") and word not in FLAGS]
    if other := [word for word in rest if not word.startswith(WHERE)]:
        raise ConfigError(
            f"resume={chosen[-1]} goes on with that sweep as it was configured, so it takes nothing else but "
            f"launcher=, hydra.launcher., runtime. and logging.progress=: drop {' '.join(other)}"
        )
    return command_for(folder, rest)


def command_for(folder: Path, changes: Sequence[str]) -> list[str]:
    """The words that go on with the sweep in a folder. What they name relative to where it began is found there."""
    sweep = read_sweep(folder)
    try:
        os.chdir(sweep.started_in)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} was started in {sweep.started_in}, which is gone.") from error
    changed = {word.split("=")[0] for word in changes}
    other_launcher = ("hydra.launcher.",) if "launcher" in changed else ()
    replaced = ("resume=", "hydra.sweep.dir=", *(f"{key}=" for key in changed), *other_launcher)
    kept = [word for word in sweep.arguments if not word.startswith(replaced)]
    return [*kept, *changes, "resume=auto", f"hydra.sweep.dir='{folder}'"]


def unfinished_sweep(arguments: Sequence[str]) -> Path | None:
    """The newest sweep of these words that has not come to its end, in the folder they name or below outputs/."""
    named = [
        word.removeprefix("hydra.sweep.dir=").strip("'\"") for word in arguments if word.startswith("hydra.sweep.dir=")
    ]
    records = [Path(named[-1]) / SWEEP] if named else list(Path("outputs").glob(f"*/*/{SWEEP}"))
    there = sorted((r for r in records if r.is_file()), key=lambda record: record.stat().st_mtime, reverse=True)
    for folder in (record.parent.absolute() for record in there):
        if what(arguments) == what(read_sweep(folder).arguments) and (named or not has_ended(folder)):
            return folder
    return None


def has_ended(folder: Path) -> bool:
    from pdlightning.runs import find_runs

    runs = find_runs([folder])
    return len(runs) == read_sweep(folder).jobs and all(run.state == "finished" for run in runs)
