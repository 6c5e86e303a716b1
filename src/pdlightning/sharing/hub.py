"""Runs on the Hugging Face hub: their `decomposition/` fetched into the hub's own cache, and runs put there."""

from __future__ import annotations

from pathlib import Path

from lightning.fabric.utilities import rank_zero_warn

from pdlightning.data.hub import HubUnreachable, check_on_hub
from pdlightning.sharing.places import DECOMPOSITION, HubRepo, hub_repo
from pdlightning.storage import METADATA, TENSORS, StorageError

NAMES = (f"{DECOMPOSITION}/{METADATA}", f"{DECOMPOSITION}/{TENSORS}")
"""All that is asked for: nothing else in a repository is ever read."""

REMEDY = "A copy of its decomposition/ from another machine can be loaded by its path."


def fetch(place: HubRepo) -> Path:
    """The `decomposition/` of a repository, on this machine.

    Where the hub cannot be reached, what is in the cache is taken, with a warning.

    Raises:
        StorageError: no such repository or revision, no decomposition in it, no network.
    """
    from huggingface_hub import HfApi

    hub, revision = HfApi(), place.revision or "main"
    try:
        info = check_on_hub("model", place.repo_id, revision, remedy=REMEDY)
    except HubUnreachable as error:
        if (cached := in_cache(place.repo_id, revision)) is None:
            raise StorageError(str(error)) from error
        rank_zero_warn(f"{error} The copy of {place} in the cache is taken: {cached}")
        return cached
    except ValueError as error:
        raise StorageError(str(error)) from error
    names = [file.rfilename for file in info.siblings or ()]
    if missing := [name for name in NAMES if name not in names]:
        there = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise StorageError(
            f"{place} on the hub is not a decomposition that pdlightning shared: it has no {missing[0]}. Its files: "
            f"{there or 'none'}. Nothing of it was fetched."
        )
    try:
        # By the name of the revision: the cache then knows which commit it was.
        folders = {Path(hub.hf_hub_download(place.repo_id, name, revision=revision)).parent for name in NAMES}
    except Exception as error:  # the client's own library decides what a lost connection raises
        raise StorageError(f"{place} could not be fetched from {hub.endpoint}: {error}. {REMEDY}") from error
    if len(folders) > 1:
        raise StorageError(f"{place} was changed on the hub while it was fetched: load it again.")
    return folders.pop()


def in_cache(repo_id: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(repo_id, name, revision=revision) for name in NAMES]
    paths = [Path(path) for path in found if isinstance(path, str)]
    return paths[0].parent if len(paths) == len(NAMES) else None


def push(folder: Path, repo_id: str, *, private: bool, token: str | None, message: str) -> str:
    """Put a folder into a model repository, as one commit; the address of the commit.

    Raises:
        StorageError: the hub cannot be reached, or does not let us.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    name = hub_repo(repo_id).repo_id
    hub = HfApi(token=token)
    try:
        hub.create_repo(name, private=private, exist_ok=True)
        return hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise StorageError(
                f"{hub.endpoint} does not let us write to {name}: log in with `hf auth login` (a token that may write),"
                f" and check that {name.partition('/')[0]} is you or an organization you write for. ({error})"
            ) from error
        raise StorageError(f"{name} could not be put on {hub.endpoint}: {error}") from error
    except Exception as error:  # the client's own library decides what a lost connection raises
        raise StorageError(f"{name} could not be put on {hub.endpoint}: {type(error).__name__}: {error}") from error
