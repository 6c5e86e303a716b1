"""A run as a folder to give away: its decomposition, config and numbers, and a card that says what they are."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from pdlightning.resume import CONFIG, SUMMARY
from pdlightning.sharing.card import model_card
from pdlightning.sharing.places import DECOMPOSITION, DecompositionFolder, RunFolder, place_of
from pdlightning.storage import (
    METADATA,
    TENSORS,
    StorageError,
    atomic_folder,
    atomic_write_json,
    atomic_write_text,
    complete_folder,
    load_decomposition,
)


def push_run(spec: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Put a run on the Hugging Face hub; the address of the commit.

    Raises:
        StorageError: it is no run that has ended; the hub cannot be reached, or does not let us.
    """
    from pdlightning.sharing.hub import push

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shared"
        write_shared(spec, folder, repo_id=repo_id)
        metadata = json.loads((folder / DECOMPOSITION / METADATA).read_text())["metadata"]
        message = f"Decomposition of {metadata['config']['name']}"
        return push(folder, repo_id, private=private, token=token, message=message)


def write_shared(spec: str | Path, folder: Path, *, repo_id: str | None = None) -> None:
    """Write what a push of the run would upload: README.md, config.yaml, summary.json, decomposition/, report.html.

    `repo_id` is the name that the card says it can be loaded by; without one it says this folder's.

    Raises:
        StorageError: it is no run that has ended, or a file of it is damaged; `folder` has something in it already.
    """
    source, report = exported_folder(spec)
    if folder.exists() and any(folder.iterdir()):
        raise StorageError(f"{folder.absolute()} is not empty: choose another folder, or empty it.")
    load_decomposition(source)  # whole, or refused
    content = json.loads((source / METADATA).read_text())
    named = [content["metadata"]["config"].get(key) for key in ("cache_dir", "init_from")]
    told = [path for path in named if path is not None and Path(path).is_absolute()]
    metadata = content["metadata"] = without_paths(content["metadata"])
    with atomic_folder(folder) as new:
        (new / DECOMPOSITION).mkdir()
        shutil.copyfile(source / TENSORS, new / DECOMPOSITION / TENSORS)
        atomic_write_json(new / DECOMPOSITION / METADATA, content)
        atomic_write_text(new / CONFIG, yaml.safe_dump(metadata["config"], sort_keys=False))
        atomic_write_json(new / SUMMARY, metadata["summary"])
        atomic_write_text(new / "README.md", model_card(content, load_by=repo_id or folder.name))
        if report is not None:
            text = report.read_text()
            for path in (str(source.parent.absolute()), *told):
                if len(Path(path).parts) > 2:  # a shorter one tells nothing, and is in other words
                    text = text.replace(path, Path(path).name)
            atomic_write_text(new / "report.html", text)


def without_paths(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a decomposition with nothing about the folders of the machine it was made on."""
    earlier = metadata["config"].get("init_from")  # the first runs had no such setting
    here = None if earlier is None else Path(earlier)
    started = {"init_from": here.name if here is not None and here.is_absolute() else earlier}
    return {
        **metadata,
        "config": {**metadata["config"], **started, "cache_dir": None},
        "summary": {**metadata["summary"], **started},
    }


def exported_folder(spec: str | Path) -> tuple[Path, Path | None]:
    """The `decomposition/` of a run on this machine that has ended, and its report.html where it has one."""
    match place_of(spec):
        case RunFolder(run):
            if not (run / SUMMARY).is_file():
                raise StorageError(
                    f"The run in {run} has not ended, so there is nothing to share yet. Go on with it: "
                    f"python -m pdlightning resume={run}"
                )
            report = run / "report.html"
            return complete_folder(run / DECOMPOSITION), report if report.is_file() else None
        case DecompositionFolder(folder):
            return complete_folder(folder), None
        case place:
            raise StorageError(f"{spec} ({type(place).__name__}) cannot be shared: give the folder of a run.")
