"""Where a run is: what a path, a name or an address that was given for it means. Nothing is read or fetched here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pdlightning.resume import CONFIG, SUMMARY
from pdlightning.storage import METADATA, StorageError, complete_folder

DECOMPOSITION = "decomposition"
FORMS = """\
  a run folder, its decomposition/, or a checkpoint in its checkpoints/
  a folder that Weights & Biases wrote: wandb/offline-run-20260131_120000-abcd1234
  entity/project/run_id, wandb:entity/project/run_id, wandb:project/run_id or the address of the run's page
  user/name, user/name@revision, hf:user/name or the address of its page on the Hugging Face hub"""

WANDB_PART = re.compile(r"[^/\\#?%:@\x00-\x1f]+")
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w][\w./-]*))?")
HUB_HOSTS = ("huggingface.co", "hf.co")
WANDB_HOSTS = ("wandb.ai", "forge.coreweave.com")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run on this machine."""

    folder: Path


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint of a run on this machine."""

    path: Path


@dataclass(frozen=True)
class DecompositionFolder:
    """A `decomposition/` that need not be in the folder of its run."""

    folder: Path


@dataclass(frozen=True)
class WandBRun:
    """A run on the server of Weights & Biases; without an entity it is the user's default one."""

    entity: str | None
    project: str
    run_id: str

    def __str__(self) -> str:
        return "/".join(part for part in (self.entity, self.project, self.run_id) if part is not None)


@dataclass(frozen=True)
class HubRepo:
    """A model repository on the Hugging Face hub."""

    repo_id: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


Place = RunFolder | CheckpointFile | DecompositionFolder | WandBRun | HubRepo


def place_of(spec: str | Path) -> Place:
    """What `spec` names. What is on this machine comes first, then a prefix or an address, then the number of parts.

    Raises:
        StorageError: it is none of the forms, or a path on this machine that is no run; the message lists the forms.
    """
    path = Path(spec).expanduser()
    if path.exists() or complete_folder(path).exists():
        try:
            return on_this_machine(path)
        except StorageError as error:
            if isinstance(spec, str) and re.fullmatch(r"[\w-][^/]*(/[^/]+){1,3}", spec):
                error.args = (f"{error} If you mean one elsewhere, write hf:{spec} or wandb:{spec}.",)
            raise
    if isinstance(spec, Path):
        raise StorageError(f"There is no {path.absolute()}.")
    if spec.startswith(("http://", "https://")):
        return of_address(spec)
    for prefix, read in (("wandb:", wandb_run), ("hf:", hub_repo)):
        if spec.startswith(prefix):
            return read(spec.removeprefix(prefix))
    looks_local = spec.startswith(("/", ".", "~")) or "\\" in spec or path.suffix in (".ckpt", ".yaml", ".json")
    if looks_local or Path(spec.partition("/")[0]).is_dir():
        raise StorageError(f"There is no {path.absolute()}.")
    parts = spec.split("/")
    if len(parts) == 2 or HUB_ID.fullmatch(spec):  # a revision may have slashes
        return hub_repo(spec)
    if len(parts) == 3 or len(parts) == 4 and parts[2] == "runs":
        return wandb_run(spec)
    raise StorageError(f"{spec!r} names no run: there is no such folder here, and it has none of the forms\n{FORMS}")


def on_this_machine(path: Path) -> Place:
    """What lies at a path: told by its files, never by its name."""
    if path.is_file():
        if path.suffix == ".ckpt":
            return CheckpointFile(path)
        raise StorageError(f"{path} is a file: a run is named by its folder, or by a checkpoint (.ckpt) in it.")
    if path.name == "files" and complete_folder(path / DECOMPOSITION).is_dir():  # of Weights & Biases
        return DecompositionFolder(path / DECOMPOSITION)
    if (path / CONFIG).is_file() and not (path / METADATA).is_file():
        return RunFolder(path)
    if (path / METADATA).is_file() or path.name == DECOMPOSITION:
        return DecompositionFolder(path)
    if (files := path / "files").is_dir():
        if complete_folder(files / DECOMPOSITION).is_dir():
            return DecompositionFolder(files / DECOMPOSITION)
        raise StorageError(
            f"{path} looks like a run of Weights & Biases, but it holds no files/{DECOMPOSITION}: the run has not "
            "ended, or was logged without its files."
        )
    if complete_folder(path / DECOMPOSITION).is_dir():
        raise StorageError(
            f"{path.absolute()} is not the folder of a run: it has no {CONFIG}. Its {DECOMPOSITION}/ can be loaded by "
            f"itself: {path / DECOMPOSITION}"
        )
    if inner := sorted(str(found.parent.name) for found in path.glob(f"*/{CONFIG}") if holds_run(found.parent)):
        raise StorageError(
            f"{path.absolute()} is not the folder of a run: it has no {CONFIG}. It holds runs, choose one of them: "
            f"{', '.join(inner[:5])}{' and others' if len(inner) > 5 else ''}."
        )
    raise StorageError(f"{path.absolute()} is not the folder of a run: it has no {CONFIG}.")


def holds_run(folder: Path) -> bool:
    """A folder of configs may have a config.yaml too, but nothing of what a run leaves beside it."""
    return any((folder / name).exists() for name in (SUMMARY, DECOMPOSITION, "checkpoints", "environment.json"))


def of_address(address: str) -> Place:
    """The page of a run or of a repository, as a browser shows it."""
    url = urlsplit(address)
    host, parts = url.netloc.removeprefix("www."), [unquote(part) for part in url.path.split("/") if part]
    if host in (*HUB_HOSTS, _host_of("HF_ENDPOINT")):
        if len(parts) >= 2 and parts[0] not in ("datasets", "spaces"):
            revision = "/".join(parts[3:]) if parts[2:3] == ["tree"] and len(parts) > 3 else None
            return hub_repo("/".join(parts[:2]) + (f"@{revision}" if revision else ""))
        raise StorageError(f"{address} is not the page of a model on the hub: expected {url.netloc}/user/name.")
    own = _host_of("WANDB_BASE_URL")
    if "runs" in parts[2:-1]:
        if host not in (WANDB_HOSTS if own is None else (own,)):
            raise StorageError(
                f"{address} is on another server of Weights & Biases than the one in use ({own or WANDB_HOSTS[0]}): "
                f"set WANDB_BASE_URL=https://{host}"
            )
        at = parts.index("runs", 2)
        return wandb_run("/".join([*parts[at - 2 : at], parts[at + 1]]))
    raise StorageError(
        f"{address} is not the page of a run. Expected https://wandb.ai/entity/project/runs/run_id or "
        "https://huggingface.co/user/name"
    )


def wandb_run(name: str) -> WandBRun:
    parts = name.split("/")
    if parts[-2:-1] == ["runs"]:  # as in the address of its page
        del parts[-2]
    if len(parts) not in (2, 3) or not all(WANDB_PART.fullmatch(part) and part.strip(". ") for part in parts):
        raise StorageError(f"{name!r} is no run of Weights & Biases: expected entity/project/run_id or project/run_id.")
    *entity, project, run_id = parts
    return WandBRun(entity[0] if entity else None, project, run_id)


def hub_repo(name: str) -> HubRepo:
    found = HUB_ID.fullmatch(name)
    if found is None or ".." in name:
        raise StorageError(f"{name!r} is no name on the hub: expected user/name or user/name@revision.")
    return HubRepo(*found.groups())


def _host_of(variable: str) -> str | None:
    """The host of a server that an environment variable names: of its pages, not of its API."""
    address = os.environ.get(variable)
    return None if not address else urlsplit(address).netloc.removeprefix("api.")
