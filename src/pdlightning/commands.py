"""What the command line does once Hydra has composed a config."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from pdlightning.config import ConfigError, to_plain
from pdlightning.resume import CONFIG, unfinished_run


def run_from_hydra(config: DictConfig, folder: Path) -> float:
    """Run, or resume, and return the objective. Mistakes of the user end in a sentence, not in a traceback."""
    from pdlightning.run import Interrupted, run
    from pdlightning.storage import StorageError
    from pdlightning.targets import UnfitTargetError

    quiet_libraries()
    try:
        plain, folder, resume = resolve(config, folder)
        summary = run(plain, folder, resume=resume)
    except (ConfigError, StorageError, UnfitTargetError, Interrupted) as error:
        remove_if_empty(folder)
        sys.exit(f"{type(error).__name__}: {error}")
    objective = plain["objective"]
    if objective not in summary["metrics"]:
        sys.exit(f"objective={objective} was not measured. Measured: {', '.join(summary['metrics'])}")
    return summary["metrics"][objective]


def resolve(config: DictConfig, folder: Path) -> tuple[dict[str, Any], Path, bool]:
    """The plain config, the folder of the run, and whether there is something to go on with."""
    if config.resume not in (None, "auto"):
        plain = yaml.safe_load((folder / CONFIG).read_text())
        return plain, folder, True
    if OmegaConf.is_missing(config, "name"):
        raise ConfigError("Choose an experiment, such as experiment=tms_5-2 (--help lists them), or set name, target, data, pd.sites and steps.")
    plain = to_plain(config)
    del plain["resume"]
    if config.resume == "auto" and (earlier := unfinished_run(plain, folder.parent)) is not None:
        remove_if_empty(folder)
        return plain, earlier, True
    return plain, folder, False


def remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def quiet_libraries() -> None:
    """Our own words stay; Lightning's notes about devices, tips and worker counts go."""
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
