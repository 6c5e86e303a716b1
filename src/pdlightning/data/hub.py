"""The Hugging Face hub: asked on request only, and given up at once where it does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

REMEDY = (
    "Without a network, read files of your own (pdlightning.data.LocalFiles), or take data=python_stdlib with its "
    "trained tokenizer, which every machine has."
)


class HubUnreachable(ValueError):
    """The hub did not answer."""


def may_download(download: bool) -> bool:
    """Whether to ask the hub: only where the config says `download: true` and no offline switch of the hub is set."""
    return download and offline_switch() is None


def offline_switch() -> str | None:
    """The environment variable that keeps the libraries of the hub from the network, or None."""
    import datasets.config
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE"
    return "HF_DATASETS_OFFLINE" if datasets.config.HF_HUB_OFFLINE else None


def check_on_hub(kind: Literal["dataset", "model"], name: str, revision: str, *, remedy: str = REMEDY) -> Any:
    """Ask the hub once for a repository; what it says of it. The libraries ask five times, for most of a minute.

    `remedy` says what to do without a network.

    Raises:
        ValueError: if the hub cannot be reached (then a `HubUnreachable`), or has no such repository or revision for
            us.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    hub = HfApi()
    ask = hub.dataset_info if kind == "dataset" else hub.model_info
    try:
        return ask(name, revision=revision, timeout=10)
    except RevisionNotFoundError as error:
        raise ValueError(f"The {kind} {name} has no revision {revision} on {hub.endpoint}.") from error
    except GatedRepoError as error:
        raise ValueError(
            f"The {kind} {name} is gated: accept its terms on {hub.endpoint} and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{hub.endpoint} has no {kind} {name}: check the name, and `hf auth login` if it is private."
        ) from error
    except Exception as error:  # the client's own library decides what a lost connection raises
        raise HubUnreachable(
            f"The {kind} {name} cannot be downloaded: {hub.endpoint} does not answer ({error}). {remedy}"
        ) from error


def not_here(kind: Literal["dataset", "tokenizer"], name: str, *, download: bool) -> str:
    """What to say of something that is not on this machine and must not be downloaded."""
    why = f"{offline_switch()} is set" if download else "download is false"
    part = "corpus" if kind == "dataset" else kind
    remedy = f"Unset {offline_switch()}" if download else f"data.{part}.download=true fetches it"
    return f"The {kind} {name} is not on this machine, and {why}. {remedy}. {REMEDY}"


@contextmanager
def datasets_offline() -> Iterator[None]:
    """Within, `datasets` looks at this machine alone; its `local_files_only` still asks the hub."""
    import datasets.config

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
