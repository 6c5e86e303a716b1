"""Going on with a run: which folder, and what the command line then means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdlightning.config import ConfigError

CONFIG, SUMMARY = "config.yaml", "summary.json"
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
        raise ConfigError(f"resume={chosen[-1]}: {folder.absolute()} is not the folder of a run (it has no {CONFIG})")
    import yaml

    changes = (a.removeprefix("runtime.").split("=", 1) for a in elsewhere)
    return folder, {key: yaml.safe_load(value) for key, value in changes}


def unfinished_run(config: dict[str, Any], siblings: Path) -> Path | None:
    """The newest folder beside this run's that computes the same, has a checkpoint to go on from, and has not ended."""
    import yaml

    from pdlightning.checkpoints import CheckpointError, latest_checkpoint

    wanted = {section: config[section] for section in WHAT_A_RUN_COMPUTES}
    for folder in sorted(siblings.glob("*/"), key=lambda f: f.stat().st_mtime, reverse=True):
        if (folder / SUMMARY).exists() or not (folder / CONFIG).is_file():
            continue
        there = yaml.safe_load((folder / CONFIG).read_text())
        if any(there.get(section) != value for section, value in wanted.items()):
            continue
        if not list(folder.glob("checkpoints/*.ckpt")):
            continue
        try:
            latest_checkpoint(folder)
        except CheckpointError:
            continue
        return folder
    return None
