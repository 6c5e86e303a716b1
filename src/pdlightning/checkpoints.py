"""Checkpoints to resume from: complete or absent, checked before they are trusted, free of code."""

from __future__ import annotations

import contextlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import CheckpointIO

from pdlightning.storage import StorageError, atomic_write, remove


class CheckpointError(StorageError):
    """A checkpoint could not be written or read; the message has the file, what survives and what to do."""


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoints, complete or absent, and readable without running code from the file.

    Give it to the Trainer as `plugins=[AtomicCheckpointIO()]`. Saving refuses what `torch.load(weights_only=True)`
    would not read back, so that a resume cannot be the first to find out.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint`; a `CheckpointError` says which earlier one survives."""
        if storage_options is not None:
            raise TypeError(f"storage_options are not supported by AtomicCheckpointIO, got {storage_options!r}")

        def write(file: BinaryIO) -> None:
            torch.save(checkpoint, file)
            file.flush()
            try:
                torch.load(file.name, map_location="meta", mmap=True, weights_only=True)
            except pickle.UnpicklingError as error:
                raise CheckpointError(
                    f"{path} was not written: only tensors and plain containers can be read back safely, and it holds "
                    f"something else. Look at your state_dict() and on_save_checkpoint(): {_one_line(error)}"
                ) from error

        try:
            atomic_write(path, write)
        except StorageError as error:
            raise CheckpointError(f"{error}\n{_other_checkpoints(Path(path))}") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint whose checksums hold (torch writes them, and does not compare them)."""
        path = Path(path)
        if (damage := _damage(path)) is not None:
            raise CheckpointError(f"{path}: {damage}. {_other_checkpoints(path)}")
        try:
            return torch.load(path, map_location=map_location, weights_only=weights_only is not False)
        except pickle.UnpicklingError as error:
            named = re.search(r"(?:GLOBAL|class|type) ([\w.]+\.[\w.]+)", str(error))
            raise CheckpointError(
                f"{path}: it holds Python objects{f' ({named[1]})' if named else ''}, and loading them could run code "
                "from the file. Ours hold tensors and plain containers only: do not load it, and ask where it comes "
                "from."
            ) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint; one that is not there is fine."""
        remove(Path(path))


def latest_checkpoint(folder: str | Path) -> Path:
    """The complete checkpoint with the highest step of a run folder or of its `checkpoints/`.

    A checkpoint is named `step=<number>.ckpt` (anything may follow the number, after a `-`). Damaged ones are passed
    over with a warning; a `CheckpointError` when none is left.
    """
    folder = Path(folder)
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    damaged = []
    for path in checkpoints_by_step(folder):
        if (damage := _damage(path)) is None:
            return path
        damaged.append(f"{path.name}: {damage}")
        warnings.warn(f"{path}: {damage}; falling back to the checkpoint before it", stacklevel=2)
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
    raise CheckpointError(
        f"no complete checkpoint: looked for step=<number>.ckpt in {folder.absolute()} and found {damaged or there}. "
        f"Check the run folder's path, or start again without resuming"
    )


def checkpoint_step(path: Path) -> int:
    """The number of finished steps in a checkpoint's name, -1 where it has none."""
    step = re.search(r"(?:^|-)step=(\d+)(?:-[^.]*)?\.ckpt$", path.name)
    return int(step[1]) if step else -1


def checkpoints_by_step(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the highest step first; of equals the youngest."""
    found = [path for path in folder.glob("*.ckpt") if checkpoint_step(path) >= 0]
    return sorted(found, key=lambda path: (checkpoint_step(path), path.stat().st_mtime), reverse=True)


def _damage(path: Path) -> str | None:
    """Why a checkpoint is not whole; None if it is. A zip ends with its index, so a truncated one has none."""
    if path.is_dir():  # sharded: torch.distributed.checkpoint writes its .metadata last, Lightning then meta.pt
        return _damage(path / "meta.pt") if (path / ".metadata").exists() else "its .metadata is missing (not finished)"
    if not path.exists():
        return f"there is no {path.name}"
    try:
        with zipfile.ZipFile(path) as archive:
            if corrupt := archive.testzip():
                return f"its entry {corrupt} is corrupt"
        with contextlib.suppress(pickle.UnpicklingError):  # objects are no damage: load_checkpoint speaks of them
            torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, LookupError) as error:
        return f"it is truncated, unreadable or no checkpoint ({path.stat().st_size} bytes; {_one_line(error)})"
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _other_checkpoints(path: Path) -> str:
    """A sentence on where to resume instead of `path`."""
    others = [other for other in checkpoints_by_step(path.parent) if other != path]
    complete = next((other for other in others if _damage(other) is None), None)
    return f"Resume from {complete}" if complete else f"No other complete checkpoint is in {path.parent.absolute()}"
