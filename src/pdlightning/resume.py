"""Going on with a run: which folder, and what the command line then means."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG, SUMMARY = "config.yaml", "summary.json"
SECTIONS_OF_A_RUN = ("name", "seed", "steps", "target", "check_target", "data", "pd")


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """`resume=RUN` goes on with that run and its own config: Hydra is told its folder, and nothing else may change."""
    chosen = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    if not chosen or chosen[-1] in ("auto", "null", ""):
        return list(arguments)
    others = [a for a in arguments if "=" in a and not a.startswith("resume=")]
    if others:
        sys.exit(f"resume={chosen[-1]} goes on with that run as it was configured, so it takes no other settings: drop {' '.join(others)}")
    folder = Path(chosen[-1]).expanduser()
    if not (folder / CONFIG).is_file():
        sys.exit(f"resume={chosen[-1]}: {folder.absolute()} is not the folder of a run (it has no {CONFIG})")
    return [a for a in arguments if not a.startswith("resume=")] + [
        f"resume='{folder}'",
        "name=resumed",
        "steps=1",
        "target={}",
        "data={}",
        "pd.sites={}",
        f"hydra.run.dir='{folder}'",
    ]


def unfinished_run(config: dict[str, Any], siblings: Path) -> Path | None:
    """The newest folder beside this run's, with the same algorithm, target and data, a checkpoint, and no summary."""
    import yaml

    wanted = {section: config[section] for section in SECTIONS_OF_A_RUN}
    for folder in sorted(siblings.glob("*/"), key=lambda f: f.stat().st_mtime, reverse=True):
        if (folder / SUMMARY).exists() or not (folder / CONFIG).is_file() or not list(folder.glob("checkpoints/step=*.ckpt")):
            continue
        there = yaml.safe_load((folder / CONFIG).read_text())
        if all(there.get(section) == value for section, value in wanted.items()):
            return folder
    return None
