"""Going on with a run: which folder, and what the command line then means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdlightning.config import ConfigError

CONFIG, SUMMARY, LOCK = "config.yaml", "summary.json", ".running"
ERROR, LOG = "error.txt", "log.txt"
"""In the folder of a job of a sweep: why it failed, and what it said where it ran beside others."""
SWEEP = "sweep.yaml"
"""In the folder of a sweep: the command, and what it varies."""
SEARCHES = "hydra_plugins.hydra_optuna_sweeper"
"""Where a sweeper lives that waits for the objective of each job."""
WHAT_A_RUN_COMPUTES = ("name", "seed", "steps", "target", "target_steps", "check_target", "data", "pd", "init_from")


def folder_to_resume(arguments: Sequence[str]) -> tuple[Path, dict[str, Any]] | None:
    """The run of `resume=RUN`, and changes of its runtime; None without it.

    It goes on as it was configured, so nothing may be said but where: `runtime.devices=1`.
    """
    chosen = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    if not chosen or chosen[-1] in ("auto", "null", ""):
        return None
    elsewhere = [a for a in arguments if a.startswith("runtime.") and "=" in a]
    if others := [a for a in arguments if not a.startswith("resume=") and a not in elsewhere]:
        raise ConfigError(
            f"resume={chosen[-1]} goes on with that run as it was configured, so it takes nothing else but "
            f"runtime.<setting>=...: drop {' '.join(others)}"
        )
    folder = Path(chosen[-1].strip("'\"")).expanduser()
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"resume={chosen[-1]}: {folder.absolute()} is not the folder of a run or of a sweep "
            f"(it has no {CONFIG} and no {SWEEP})"
        )
    import yaml

    changes = (a.removeprefix("runtime.").split("=", 1) for a in elsewhere)
    return folder, {key: yaml.safe_load(value) for key, value in changes}


def same_computation(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configs compute the same, wherever they do it and whatever they log (spec D1)."""

    def computed(config: Mapping[str, Any]) -> list[Any]:
        parts = {**config, "pd": {**(config.get("pd") or {}), "compile": None}}
        return [parts.get(section) for section in WHAT_A_RUN_COMPUTES]

    return computed(one) == computed(other)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run can go on from a whole checkpoint."""
    from pdlightning.checkpoints import CheckpointError, latest_checkpoint

    if not list(folder.glob("checkpoints/*.ckpt")):
        return False
    try:
        latest_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def unfinished_run(config: dict[str, Any], siblings: Path) -> Path | None:
    """The newest folder beside this run's that computes the same, has a checkpoint to go on from, and has not ended."""
    import yaml

    for folder in sorted(siblings.glob("*/"), key=lambda f: f.stat().st_mtime, reverse=True):
        if (folder / SUMMARY).exists() or not (folder / CONFIG).is_file():
            continue
        if same_computation(config, yaml.safe_load((folder / CONFIG).read_text())) and has_checkpoint(folder):
            return folder
    return None
