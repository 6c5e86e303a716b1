"""Targets on disk: trained once, found again by the hash of their configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from safetensors.torch import load, save
from torch import nn

from pdlightning.config import config_hash, to_plain
from pdlightning.storage import atomic_folder, complete_folder, default_cache_dir, remove
from pdlightning.targets.recipe import Recipe, Trained

FORMAT_VERSION = 1
WEIGHTS, RECORD = "weights.safetensors", "target.json"


@dataclass(frozen=True)
class TargetResult:
    """A trained target: frozen, in eval mode, on the CPU; its folder (weights, record, figures); its summary."""

    model: nn.Module
    folder: Path
    summary: dict[str, Any]


class DamagedTargetError(RuntimeError):
    """A stored target is not what was written."""


def obtain_target(
    recipe: Recipe,
    *,
    config: Mapping[str, Any],
    cache_dir: str | Path | None = None,
    accelerator: str = "cpu",
) -> TargetResult:
    """The target of a recipe: from the cache if it is there, else trained, checked and stored.

    Args:
        recipe: how the target is made.
        config: the plain configuration that the recipe was built from; its hash names the folder (with what else
            decides the weights, where the recipe knows of such).
        cache_dir: where targets are kept; None means `default_cache_dir()`.
        accelerator: what to train on.

    A damaged entry is reported and trained again; an interrupted training goes on, where its recipe can. Processes
    that want the same target at once wait for the first.

    Raises:
        UnfitTargetError: if no attempt passes the recipe's check; nothing is stored then.
    """
    root = Path(default_cache_dir() if cache_dir is None else cache_dir) / "targets"
    root.mkdir(parents=True, exist_ok=True)
    identity = {**to_plain(config), **recipe.beyond_config()}
    folder = root / config_hash(identity)
    workspace = root / f"{folder.name}.training"
    with FileLock(f"{folder}.lock"):
        stored = complete_folder(folder)
        if stored.exists():
            try:
                result = load_target(recipe, stored)
                rank_zero_info(f"Target loaded from {stored}: {result.summary['check']}.")
                return result
            except DamagedTargetError as error:
                rank_zero_warn(f"{error} It is trained again.")
        trained = recipe.make(accelerator=accelerator, workspace=workspace)
        write_target(trained, folder, identity)
        remove(workspace)
        return TargetResult(trained.model, folder, trained.summary)


def write_target(trained: Trained, folder: Path, identity: dict[str, Any]) -> None:
    """Weights, record, figures and tables, as one folder that is complete or absent."""
    weights = save({name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()})
    record = {
        "format_version": FORMAT_VERSION,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "summary": trained.summary,
        "config": identity,
    }
    with atomic_folder(folder) as aside:
        (aside / WEIGHTS).write_bytes(weights)
        (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        for name, figure in trained.figures.items():
            figure.savefig(aside / f"{name}.png")
        for name, text in trained.tables.items():
            (aside / f"{name}.csv").write_text(text)


def load_target(recipe: Recipe, folder: Path) -> TargetResult:
    """A stored target.

    Raises:
        DamagedTargetError: if a file is missing or unreadable, or the weights are not the ones written or not the
            recipe's.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
        weights = (folder / WEIGHTS).read_bytes()
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {record['format_version']} instead of {FORMAT_VERSION}")
        if hashlib.sha256(weights).hexdigest() != record["sha256"]:
            raise ValueError(f"{WEIGHTS} does not have the checksum in {RECORD}")
        model = recipe.blank(record["summary"]["seed"])
        model.load_state_dict(load(weights))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DamagedTargetError(f"The stored target {folder} is damaged ({error}).") from error
    return TargetResult(model, folder, record["summary"])
