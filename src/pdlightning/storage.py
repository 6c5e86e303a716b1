"""Files that are complete or absent: written beside their place, fsynced, renamed (atomic on one file system).

A temporary name, `.<name>.<host>-<pid>-<random>.tmp`, never looks like a result, and the next write into the folder
removes those whose process is gone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT_VERSION = 2
"""Of a stored decomposition. 2 added the ci function, the kind of target and the environment to the metadata."""

TENSORS, METADATA = "tensors.safetensors", "metadata.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
"""torch's names of the types in a safetensors file."""
PACKAGES = ("pdlightning", "torch", "lightning", "torchmetrics", "hydra-core", "safetensors", "transformers")


class StorageError(RuntimeError):
    """A file could not be written or read; the message has the file, what survives and what to do."""


def default_cache_dir() -> Path:
    """PDLIGHTNING_CACHE if it is set, else ~/.cache/pdlightning."""
    return Path(os.environ.get("PDLIGHTNING_CACHE") or Path.home() / ".cache" / "pdlightning").expanduser()


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` with a binary file that takes the place of `path` once it is complete and on the disk.

    When anything fails, what stood at `path` before is untouched. A full disk and its kin raise a `StorageError`;
    another exception of `write` passes through.
    """
    path = Path(path)
    with _beside(path) as temporary:
        with temporary.open("wb") as file:
            write(file)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """`atomic_write` of `content`."""
    atomic_write(path, lambda file: file.write(content))


def atomic_write_text(path: str | Path, content: str) -> None:
    """`atomic_write` of `content` in UTF-8."""
    atomic_write_bytes(path, content.encode())


def atomic_write_json(path: str | Path, value: Any) -> None:
    """`atomic_write` of `value` as indented JSON; a `TypeError` if it is not made of plain values."""
    atomic_write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `path` when the block ends well.

    When it does not, the old folder stays and the new one is removed. No file system replaces a folder that has
    content in one move, so the old one stands at `.<name>.previous` for an instant; `complete_folder` finds it there.
    """
    path = Path(path)
    previous = path.with_name(f".{path.name}.previous")
    with _beside(path) as temporary:
        temporary.mkdir()
        yield temporary
        for below in [*temporary.rglob("*"), temporary]:
            _sync(below)
        if path.exists():
            remove(previous)
            os.rename(path, previous)
        os.rename(temporary, path)
        _sync(path.parent)
        remove(previous)


def complete_folder(path: str | Path) -> Path:
    """`path`, or the previous version of it if a process died between the two renames of `atomic_folder`."""
    path = Path(path)
    previous = path.with_name(f".{path.name}.previous")
    return previous if previous.exists() and not path.exists() else path


def save_decomposition(folder: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors (safetensors) and plain metadata (JSON) as one folder, whole or absent. Nothing is pickled."""
    from safetensors.torch import save

    stored = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    tensor_bytes = save(stored)
    content = {
        "format_version": FORMAT_VERSION,
        "sha256": hashlib.sha256(tensor_bytes).hexdigest(),
        "tensors": _described(stored),
        "metadata": dict(metadata),
    }
    with atomic_folder(folder) as new:
        (new / TENSORS).write_bytes(tensor_bytes)
        (new / METADATA).write_text(json.dumps(content, indent=2) + "\n")


def load_decomposition(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the metadata of `save_decomposition`; a `StorageError` unless both are whole.

    What the files say of themselves is compared before any tensor is read; nothing in them is run.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = complete_folder(folder)
    content = _read(folder / METADATA, lambda path: json.loads(path.read_text()), (ValueError, RecursionError))
    _check_format(folder, content)
    found, recorded = _read(folder / TENSORS, _header, SafetensorError), content["tensors"]
    for name in sorted(found.keys() | recorded.keys()):
        if found.get(name) != recorded.get(name):
            raise StorageError(
                f"{folder}: tensor '{name}' is {found.get(name, 'absent')} in {TENSORS} but "
                f"{recorded.get(name, 'absent')} in {METADATA}; one of them was changed, export the run again"
            )
    with (folder / TENSORS).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != content["sha256"]:
            raise StorageError(
                f"{folder / TENSORS} does not have the checksum in {METADATA}: it was changed, export the run again"
            )
    return _read(folder / TENSORS, load_file, SafetensorError), content["metadata"]


def _check_format(folder: Path, content: Any) -> None:
    """A format that is known, with all of its keys."""
    version = content.get("format_version", "unknown") if isinstance(content, dict) else "unknown"
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise StorageError(
            f"{folder} was written by a newer pdlightning: its format version is {version}, and this one reads up to "
            f"{FORMAT_VERSION}. Upgrade: pip install -U pdlightning"
        )
    if version not in range(1, FORMAT_VERSION + 1):
        raise StorageError(
            f"{folder}: its format version is {version}, and this pdlightning reads 1 to {FORMAT_VERSION}: "
            f"{METADATA} is not one of ours, or was changed"
        )
    for key, kind in (("sha256", str), ("tensors", dict), ("metadata", dict)):
        if not isinstance(content.get(key), kind):
            raise StorageError(f"{folder / METADATA} is damaged: it has no {key}; export the run again")


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, shapes and types in a safetensors file, without its tensors; a file of another size is refused."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is not iterable)
        return {
            name: {"shape": list(of.get_shape()), "dtype": DTYPES.get(of.get_dtype(), of.get_dtype())}
            for name, of in slices.items()
        }


def weights_sha256(module: nn.Module) -> str:
    """Of the names, types, shapes and values of all weights and buffers that a module would save."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _read(path: Path, read: Callable[[Path], Any], broken: type[Exception] | tuple[type[Exception], ...]) -> Any:
    if not path.is_file():
        raise StorageError(f"{path} is missing, so {path.parent} is not a decomposition; check the path")
    try:
        return read(path)
    except broken as error:
        raise StorageError(f"{path}: truncated or damaged ({error}); export the run again") from error


def _described(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in tensors.items()}


def run_environment() -> dict[str, Any]:
    """What a run ran on: versions (None: not installed), platform, machine, and our own checkout's git commit."""
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    commit = _commit()
    changes = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    git = None if commit is None else {"commit": commit, "dirty": changes != ""}
    return {"versions": versions, "platform": platform.platform(), "machine": socket.gethostname(), "git": git}


def uncommitted_changes() -> str | None:
    """The diff of our own checkout to its commit, which `run_environment` names; None where there is none."""
    return _git("diff", "HEAD") or None if _commit() else None


def _commit() -> str | None:
    # A virtual environment may lie inside somebody else's checkout: the commit counts only if git tracks this file.
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    return _git("rev-parse", "HEAD") if tracked else None


def _git(*words: str) -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`, gone at the end; a failing disk becomes a `StorageError`."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        yield temporary
    except (OSError, RuntimeError) as error:
        # torch.save hides the OSError of a full disk behind the RuntimeError of closing its archive.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise StorageError(_failed_write(path, cause)) from error
    finally:
        with contextlib.suppress(OSError):  # a disk that fails here too leaves a name that is no result
            remove(temporary)


def _failed_write(path: Path, cause: OSError) -> str:
    survivor, earlier = "There was no earlier version", complete_folder(path)
    if earlier.exists():
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(earlier.stat().st_mtime))
        survivor = f"The version written at {written} is still there, complete: {earlier}"
    remedy = "Check the path, its permissions and its file system"
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free
        remedy = f"Free space there ({free / 1e6:.0f} MB are left): delete old runs or checkpoints, then resume"
    return f"{path} was not written: {cause}. {survivor}. {remedy}"


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of this machine's dead processes."""
    for leftover in folder.glob(".*.tmp"):
        owner = re.fullmatch(rf".*\.{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]+\.tmp", leftover.name)
        if owner is None:
            continue
        try:
            with contextlib.suppress(PermissionError):  # somebody else's process, and running
                os.kill(int(owner[1]), 0)
        except ProcessLookupError:
            remove(leftover)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
