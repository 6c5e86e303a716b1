"""What the files of a run say, read and compared with one another before anything is built."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from pdlightning.checkpoints import AtomicCheckpointIO, checkpoint_step, checkpoints_by_step, latest_checkpoint
from pdlightning.config import flatten
from pdlightning.resume import CONFIG, SUMMARY
from pdlightning.sharing.places import (
    DECOMPOSITION,
    CheckpointFile,
    DecompositionFolder,
    HubRepo,
    Place,
    RunFolder,
    WandBRun,
)
from pdlightning.storage import StorageError, complete_folder, load_decomposition

TARGET = "target."
"""Before the names of the target's own weights among the tensors of a decomposition."""

Config = dict[str, Any]


@dataclass(frozen=True)
class StoredRun:
    """A run as its files tell it.

    Attributes:
        origin: what was asked for, for messages.
        folder: of the run on this machine, or of its decomposition where that is all there is.
        config: as it was run.
        own: from the folder of a run on this machine, whose config is taken for the user's own.
        state: of the decomposition.
        target: tensors of the target; None where they are not stored.
        target_record: how the target was made; None in a checkpoint of a run that has not ended.
        sites: site -> kind and sizes; None in a checkpoint.
        step: the number of steps behind the state.
        summary: the content of summary.json; empty for a run that has not ended, or an earlier step.
    """

    origin: str
    folder: Path
    config: Config
    own: bool
    state: dict[str, Tensor]
    target: dict[str, Tensor] | None
    target_record: Mapping[str, Any] | None
    sites: Mapping[str, Any] | None
    step: int
    summary: dict[str, Any]


def read(place: Place, *, step: int | None) -> StoredRun:
    """Read a run from where it is; what is elsewhere is fetched first.

    Raises:
        StorageError: it cannot be had, or is damaged; the message says which file and what to do.
    """
    match place:
        case RunFolder(folder):
            return read_run(folder, step=step)
        case CheckpointFile(path):
            return read_lone_checkpoint(path, step=step)
        case DecompositionFolder(folder):
            return of_step(read_decomposition(folder, origin=str(folder)), step)
        case WandBRun():
            from pdlightning.sharing.wandb_runs import fetch

            return of_step(read_decomposition(fetch(place), origin=f"wandb:{place}"), step)
        case HubRepo():
            from pdlightning.sharing.hub import fetch

            return of_step(read_decomposition(fetch(place), origin=f"hf:{place}"), step)


def of_step(stored: StoredRun, step: int | None) -> StoredRun:
    if step not in (None, stored.step):
        raise StorageError(
            f"{stored.origin} has the weights after its last step, {stored.step}, alone, and not those after {step}: "
            "checkpoints stay in the folder of the run."
        )
    return stored


def read_run(folder: Path, *, step: int | None) -> StoredRun:
    """A run that has ended, from its decomposition; another, or an earlier step of one, from a checkpoint."""
    config: Config = read_mapping(folder / CONFIG, yaml.safe_load)
    ended = (folder / SUMMARY).is_file()
    if ended and step in (None, config.get("steps")):
        stored = read_decomposition(folder / DECOMPOSITION, origin=str(folder))
        refuse_other_config(folder, config, stored.config)
        return StoredRun(
            **vars(stored)
            | {"folder": folder, "config": config, "own": True, "summary": read_mapping(folder / SUMMARY, json.loads)}
        )
    if step is None:
        return read_checkpoint(folder, config, latest_checkpoint(folder))
    path = folder / "checkpoints" / f"step={step}.ckpt"
    if not path.exists():
        kept = sorted(checkpoint_step(kept) for kept in checkpoints_by_step(folder / "checkpoints"))
        raise StorageError(
            f"{folder} has no checkpoint of step {step}. It has {', '.join(map(str, kept)) or 'none'}"
            " (logging.checkpoints_kept says how many stay)."
        )
    return read_checkpoint(folder, config, path)


def read_lone_checkpoint(path: Path, *, step: int | None) -> StoredRun:
    """A checkpoint by its own name; the rest is in the folder of its run."""
    if step not in (None, checkpoint_step(path)):
        raise StorageError(f"{path} is the checkpoint of step {checkpoint_step(path)}, and step={step} was asked for.")
    folder = path.absolute().parent.parent
    if not (folder / CONFIG).is_file():
        raise StorageError(
            f"{path} is not in the checkpoints/ of a run ({folder} has no {CONFIG}): it has no weights of the target, "
            "so it cannot be loaded alone. To hand on a run, give its decomposition/."
        )
    return read_checkpoint(folder, read_mapping(folder / CONFIG, yaml.safe_load), path)


def read_checkpoint(folder: Path, config: Config, path: Path) -> StoredRun:
    content = AtomicCheckpointIO().load_checkpoint(path)
    if not {"pdlightning_config", "state_dict"} <= content.keys():
        raise StorageError(f"{path} is not a checkpoint of pdlightning: it has no config of a run.")
    refuse_other_config(folder, config, content["pdlightning_config"])
    target = record = None
    if complete_folder(folder / DECOMPOSITION).is_dir():  # so that the target need not be made again
        exported = read_decomposition(folder / DECOMPOSITION, origin=str(folder))
        target, record = exported.target, exported.target_record
    return StoredRun(
        origin=str(path),
        folder=folder,
        config=config,
        own=True,
        state=content["state_dict"],
        target=target,
        target_record=record,
        sites=None,
        step=checkpoint_step(path),
        summary={},
    )


def read_decomposition(folder: Path, *, origin: str) -> StoredRun:
    """A `decomposition/`, which says all of itself."""
    tensors, metadata = load_decomposition(folder)
    for key in ("sites", "target", "config", "summary"):
        if not isinstance(metadata.get(key), dict):
            raise StorageError(f"{origin}: its metadata has no {key}; it is damaged, or not of a run of pdlightning.")
    config, summary = metadata["config"], metadata["summary"]
    if not isinstance(summary.get("steps"), int) or summary["steps"] != config.get("steps"):
        raise StorageError(
            f"{origin}: its summary says {summary.get('steps')!r} steps and its config {config.get('steps')!r}; one "
            "of them was changed."
        )
    weights = {name.removeprefix(TARGET): t for name, t in tensors.items() if name.startswith(TARGET)}
    return StoredRun(
        origin=origin,
        folder=folder,
        config=config,
        own=False,
        state={name: t for name, t in tensors.items() if not name.startswith(TARGET)},
        target=weights or None,
        target_record=metadata["target"],
        sites=metadata["sites"],
        step=summary["steps"],
        summary=summary,
    )


def read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(path.read_text())
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise StorageError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise StorageError(f"{path} is damaged: expected a mapping, got {content!r:.80}.")
    return content


def refuse_other_config(folder: Path, config: Config, stored: Config) -> None:
    """The weights belong to the config they were made with, of which they carry a copy."""
    here, there = flatten(config), flatten(stored)
    differing = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
    # A resumed run may compute on other devices.
    changed = [key for key in differing if not key.startswith("runtime.")]
    if changed:
        raise StorageError(
            f"{folder / CONFIG} was changed after the run ({', '.join(changed[:5])}), so it does not describe these "
            "weights. Put it back."
        )
