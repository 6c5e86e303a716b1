"""What the command line does: a run, or going on with one. A mistake of the user ends in a sentence, no traceback."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from pdlightning.config import ConfigError, to_plain
from pdlightning.resume import CONFIG, SUMMARY, unfinished_run
from pdlightning.schema import check_settings


def run_from_hydra(config: DictConfig, folder: Path) -> float:
    """Run a composed config; returns the objective."""
    plain = plain_config(config)
    return or_a_sentence(lambda: run_config(plain, folder), folder)


def plain_config(config: DictConfig) -> dict[str, Any]:
    """A composed config as plain values; paths mean the same from wherever the run is looked at or resumed."""
    plain = to_plain(config)
    if isinstance(plain["init_from"], str):
        path = Path(plain["init_from"]).expanduser()  # or one elsewhere, such as user/name on the hub
        plain["init_from"] = str(path.absolute()) if path.exists() else plain["init_from"]
    return plain


def run_config(config: dict[str, Any], folder: Path, *, resume: bool = False) -> float:
    """Run a plain config, or go on with it in its folder; returns the objective."""
    plain = {key: value for key, value in config.items() if key != "resume"}
    check_settings(plain)  # before torch is imported
    from pdlightning.launching.launch import run_on_ranks

    quiet_libraries()
    if plain["only"] == "target":
        from pdlightning.run import target_alone

        target_alone(plain)
        remove_if_empty(folder)
        return 0.0
    if not resume and config["resume"] == "auto" and (earlier := unfinished_run(plain, folder.parent)) is not None:
        remove_if_empty(folder)
        folder, resume = earlier, True
    return objective(plain, run_on_ranks(plain, folder, resume=resume))


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
    from pdlightning.launching.launch import run_on_ranks
    from pdlightning.schema import complete

    quiet_libraries()
    config = complete(config)
    config["runtime"] |= runtime
    check_settings(config)
    run_on_ranks(config, folder, resume=True)


def or_a_sentence(work: Callable[[], Any], folder: Path | None = None) -> Any:
    """Do the work; where it fails by a mistake of the user, end the process with that in words.

    `folder` is that of a run, which is not left behind empty.
    """
    try:
        return work()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sentence = sentence_of(error)
        if folder is not None:
            remove_if_empty(folder)
        if sentence is None or os.environ.get("PDLIGHTNING_TRACEBACK"):
            raise
        sys.exit(sentence)


def sentence_of(error: Exception) -> str | None:
    """What to say about an error that the user can do something about; None for any other."""
    if isinstance(error, ConfigError):
        return f"Error in the config: {error}"
    from pdlightning.analysis.comparison import NotComparable
    from pdlightning.callbacks import Interrupted
    from pdlightning.guards import NonFiniteError
    from pdlightning.launching.launch import RankError
    from pdlightning.storage import StorageError
    from pdlightning.targets import UnfitTargetError

    known = (Interrupted, NonFiniteError, NotComparable, RankError, StorageError, UnfitTargetError)
    return "\n".join([str(error), *getattr(error, "__notes__", [])]) if isinstance(error, known) else None


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is not, or another rank was quicker
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
