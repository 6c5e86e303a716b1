"""Runs on the server of Weights & Biases: their `decomposition/`, among the files of the run, fetched once."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import socket
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock
from lightning.fabric.utilities import rank_zero_warn

from pdlightning.sharing.places import DECOMPOSITION, WandBRun
from pdlightning.storage import METADATA, TENSORS, StorageError, atomic_folder, complete_folder, default_cache_dir

NAMES = (f"{DECOMPOSITION}/{METADATA}", f"{DECOMPOSITION}/{TENSORS}")
"""All that is asked for: a file of any other name is never written. W&B's own config.yaml is not ours, so none is."""

TIMEOUT = 20


def fetch(place: WandBRun) -> Path:
    """The `decomposition/` of a run as it is there now, on this machine.

    Where the server cannot be reached, an earlier copy is taken, with a warning.

    Raises:
        StorageError: no such run, no decomposition in it, no key, no network.
    """
    kept = None if place.entity is None else folder_of(place)
    try:
        run = find(place)
        place = WandBRun(run.entity, run.project, run.id)
        kept = folder_of(place)
        files = list(run.files(names=list(NAMES)))
    except Unreachable as error:
        if kept is None or not complete_folder(kept).is_dir():
            raise
        rank_zero_warn(f"{error} The copy of {place} from an earlier download is taken: {kept}")
        return complete_folder(kept)
    by_name = {file.name: file for file in files}
    if missing := [name for name in NAMES if name not in by_name]:
        raise StorageError(
            f"The run {place} of Weights & Biases has no {missing[0]} among its files: it has not ended, was logged "
            "without its files, or is not a run of pdlightning."
        )
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"):
        if not all(same(complete_folder(kept) / Path(name).name, by_name[name]) for name in NAMES):
            download(place, [by_name[name] for name in NAMES], kept)
    return complete_folder(kept)


class Unreachable(StorageError):
    """The server did not answer, or there is no key for it."""


def find(place: WandBRun) -> Any:
    """The run, as wandb's own client knows it."""
    import wandb

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it tells where it has the key from
            has_key = wandb.login(prompt=False, verify=False)
        if not has_key:
            raise Unreachable(
                f"wandb:{place} cannot be fetched: there is no key for Weights & Biases on this machine. Log in with "
                "`wandb login`, or set WANDB_API_KEY."
            )
        check_reachable(wandb.setup().settings.base_url, place)
        run = wandb.Api(timeout=TIMEOUT).run(str(place))
    except wandb.Error as error:
        said = str(error)
        if "could not find run" in said.lower() or "not found" in said.lower():
            raise StorageError(
                f"Weights & Biases has no run {place}, or you may not see it: check entity, project and run id (the "
                "last part of the address of its page, not its name)."
            ) from error
        raise Unreachable(f"wandb:{place} cannot be fetched: Weights & Biases does not answer ({said}).") from error
    return run


def check_reachable(address: str, place: WandBRun) -> None:
    """Knock once: the client itself would try for most of a minute. Behind a proxy, only the client knows the way."""
    url = urlsplit(address)
    if urllib.request.getproxies().keys() & {url.scheme, "all"} and not urllib.request.proxy_bypass(url.netloc):
        return
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout=5).close()
    except OSError as error:
        raise Unreachable(
            f"wandb:{place} cannot be fetched: {address} does not answer ({error}). Without a network, load the folder "
            "of the run, or the wandb/ folder beside it, by its path."
        ) from error


def folder_of(place: WandBRun) -> Path:
    return default_cache_dir() / "wandb" / str(place.entity) / place.project / place.run_id / DECOMPOSITION


def same(path: Path, file: Any) -> bool:
    """Whether a file here is the one there; the server says its size and, in base 64, its MD5."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).digest()
    return file.md5 in (base64.b64encode(digest).decode(), digest.hex())


def download(place: WandBRun, files: list[Any], kept: Path) -> None:
    """Both files as one folder, whole or absent."""
    import wandb

    with atomic_folder(kept) as new:
        for file in files:
            aside = new / "download"
            try:
                file.download(root=str(aside), replace=True).close()
            except (wandb.Error, OSError) as error:
                raise Unreachable(f"{file.name} of wandb:{place} could not be fetched: {error}") from error
            (aside / file.name).rename(new / Path(file.name).name)
            (aside / DECOMPOSITION).rmdir()
            aside.rmdir()
