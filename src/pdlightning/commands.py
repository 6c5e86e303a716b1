"""What the command line does: a run, or going on with one. A mistake of the user ends in a sentence, no traceback."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from pdlightning.config import ConfigError, to_plain
from pdlightning.resume import CONFIG, SUMMARY, unfinished_run
from pdlightning.schema import check_settings

ERROR = "error.txt"
"""Why a job of a sweep ended, in its folder."""


def run_from_hydra(config: DictConfig, folder: Path, *, in_sweep: bool) -> float:
    """Run a composed config; returns the objective. A job of a sweep that fails gives nan, and the sweep goes on."""
    if not in_sweep:
        return or_a_sentence(lambda: run_config(config, folder), folder)
    try:
        return run_config(config, folder)
    except Exception as error:
        from pdlightning.callbacks import Interrupted

        if isinstance(error, Interrupted):
            sys.exit(str(error))
        sentence = sentence_of(error)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR).write_text(sentence or traceback.format_exc())
        print(f"Job {folder.name}: {sentence or traceback.format_exc()}", file=sys.stderr)
        return math.nan


def run_config(config: DictConfig, folder: Path) -> float:
    plain = to_plain(config)
    resume = plain.pop("resume")
    check_settings(plain)  # before torch is imported
    if plain["init_from"] is not None:  # the same folder from wherever the run is looked at or resumed
        plain["init_from"] = str(Path(plain["init_from"]).expanduser().absolute())
    from pdlightning.launch import run_on_ranks

    quiet_libraries()
    if plain["only"] == "target":
        from pdlightning.run import target_alone

        target_alone(plain)
        remove_if_empty(folder)
        return 0.0
    if resume == "auto" and (earlier := unfinished_run(plain, folder.parent)) is not None:
        remove_if_empty(folder)
        return objective(plain, run_on_ranks(plain, earlier, resume=True))
    return objective(plain, run_on_ranks(plain, folder))


def objective(config: dict[str, Any], summary: dict[str, Any]) -> float:
    name = config["objective"]
    if name not in summary["metrics"]:
        raise ConfigError(f"objective={name} was not measured. Measured: {', '.join(summary['metrics'])}")
    return summary["metrics"][name]


def resume_run(folder: Path, runtime: dict[str, Any]) -> None:
    """`resume=RUN`, with changes of its runtime."""
    or_a_sentence(lambda: go_on(folder, runtime), folder)


def go_on(folder: Path, runtime: dict[str, Any]) -> None:
    try:
        config = yaml.safe_load((folder / CONFIG).read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{folder / CONFIG} is damaged: {error}") from error
    if (folder / SUMMARY).is_file():
        from pdlightning.results import result_table

        print(f"{folder} has finished, there is nothing to go on with. Its results:")
        print(result_table(json.loads((folder / SUMMARY).read_text()), config))
        return
    from pdlightning.launch import run_on_ranks
    from pdlightning.schema import complete

    quiet_libraries()
    config = complete(config)
    config["runtime"] |= runtime
    check_settings(config)
    run_on_ranks(config, folder, resume=True)


def or_a_sentence(work: Callable[[], Any], folder: Path) -> Any:
    """Do the work; where it fails by a mistake of the user, end the process with that in words."""
    try:
        return work()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sentence = sentence_of(error)
        remove_if_empty(folder)
        if sentence is None or os.environ.get("PDLIGHTNING_TRACEBACK"):
            raise
        sys.exit(sentence)


def sentence_of(error: Exception) -> str | None:
    """What to say about an error that the user can do something about; None for any other."""
    if isinstance(error, ConfigError):
        return f"Error in the config: {error}"
    from pdlightning.callbacks import Interrupted
    from pdlightning.guards import NonFiniteError
    from pdlightning.launch import RankError
    from pdlightning.storage import StorageError
    from pdlightning.targets import UnfitTargetError

    known = (Interrupted, NonFiniteError, RankError, StorageError, UnfitTargetError)
    return "\n".join([str(error), *getattr(error, "__notes__", [])]) if isinstance(error, known) else None


def remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def quiet_libraries() -> None:
    """Our own words, warnings without the line of code they come from, no notes of Lightning on devices and tips."""
    import lightning

    library = str(Path(lightning.__file__).parent)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Our words go through the same logger as Lightning's: what tells them apart is the file they come from.
    words = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    words.setLevel(logging.INFO)
    words.addFilter(lambda record: not record.pathname.startswith(library) or record.levelno > logging.INFO)
    for message in (".*does not have many workers.*", ".*have no `validation_step`.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message=message)
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
