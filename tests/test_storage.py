from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pdlightning import storage
from pdlightning.checkpoints import AtomicCheckpointIO, latest_checkpoint
from pdlightning.storage import (
    StorageError,
    atomic_folder,
    atomic_write,
    atomic_write_json,
    atomic_write_text,
    complete_folder,
    load_decomposition,
    run_environment,
    save_decomposition,
)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch):
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    return lambda: monkeypatch.setattr(os, "fsync", fail)


def test_a_written_file_has_its_content_and_nothing_lies_beside_it(tmp_path: Path):
    atomic_write_json(tmp_path / "new" / "a.json", {"x": 1e-30})
    atomic_write_text(tmp_path / "new" / "a.txt", "é")
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"x": 1e-30}
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é".encode()
    assert sorted(os.listdir(tmp_path / "new")) == ["a.json", "a.txt"]


def test_a_full_disk_leaves_the_old_file_and_says_what_survived_and_what_to_do(tmp_path: Path, full_disk):
    path = tmp_path / "summary.json"
    atomic_write_text(path, "old")
    full_disk()
    with pytest.raises(StorageError) as error:
        atomic_write_text(path, "new")
    message = str(error.value)
    assert str(path) in message and "No space left on device" in message
    assert re.search(r"version written at 20\d\d-\S+ \S+ is still there, complete", message)
    assert re.search(r"Free space there \(\d+ MB are left\)", message)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["summary.json"]


def test_a_full_disk_without_an_earlier_version_says_so(tmp_path: Path, full_disk):
    full_disk()
    with pytest.raises(StorageError, match="There was no earlier version"):
        atomic_write_text(tmp_path / "a", "new")
    assert os.listdir(tmp_path) == []


def test_a_file_where_a_folder_should_be_is_a_storage_error(tmp_path: Path):
    (tmp_path / "a").write_text("")
    with pytest.raises(StorageError, match="a/b was not written: .*Check the path, its permissions"):
        atomic_write_text(tmp_path / "a" / "b", "x")


def test_an_exception_of_the_writer_passes_and_the_old_file_stays(tmp_path: Path):
    atomic_write_text(tmp_path / "a", "old")

    def write(file: Any) -> None:
        file.write(b"half")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        atomic_write(tmp_path / "a", write)
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_dead_process_leftover_is_removed_and_a_living_ones_is_kept(tmp_path: Path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = storage.socket.gethostname()
    (tmp_path / f".a.{host}-{dead.pid}-00ff00.tmp").write_text("half")
    living = f".a.{host}-{os.getpid()}-00ff00.tmp"
    elsewhere = f".a.another-machine-{dead.pid}-00ff00.tmp"
    (tmp_path / living).write_text("half")
    (tmp_path / elsewhere).write_text("half")
    atomic_write_text(tmp_path / "a", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([living, elsewhere, "a"])


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "f") as folder:
            (folder / content).mkdir()
            (folder / content / "x").write_text(content)
    assert os.listdir(tmp_path) == ["f"] and os.listdir(tmp_path / "f") == ["new"]


@pytest.mark.parametrize("failure", [ValueError("mine"), KeyboardInterrupt()])
def test_a_failing_block_keeps_the_old_folder(tmp_path: Path, failure: BaseException):
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("old")
    with pytest.raises(type(failure)), atomic_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("new")
        raise failure
    assert (tmp_path / "f" / "x").read_text() == "old" and os.listdir(tmp_path) == ["f"]


def test_a_full_disk_keeps_the_old_folder(tmp_path: Path, full_disk):
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("old")
    full_disk()
    with pytest.raises(StorageError, match="is still there, complete"), atomic_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "f" / "x").read_text() == "old" and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("fails", [1, 2])
def test_a_folder_survives_a_failing_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int):
    save_decomposition(tmp_path / "d", {"V": torch.zeros(2)}, {"version": "old"})
    calls, rename = [], os.rename

    def failing(old: Path, new: Path) -> None:
        calls.append(new)
        if len(calls) == fails:
            raise OSError(errno.EIO, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StorageError, match="is still there, complete"):
        save_decomposition(tmp_path / "d", {"V": torch.zeros(2)}, {"version": "new"})
    monkeypatch.undo()
    assert load_decomposition(tmp_path / "d")[1] == {"version": "old"}
    save_decomposition(tmp_path / "d", {"V": torch.zeros(2)}, {"version": "third"})
    assert load_decomposition(tmp_path / "d")[1] == {"version": "third"} and os.listdir(tmp_path) == ["d"]
    assert complete_folder(tmp_path / "d") == tmp_path / "d"


def write_for_ever(folder: Path) -> None:
    for i in itertools.count():
        AtomicCheckpointIO().save_checkpoint({"i": i, "weights": torch.full((5000,), float(i))}, folder / "step=1.ckpt")
        save_decomposition(folder / "decomposition", {"V": torch.full((5000,), float(i))}, {"i": i})


def assert_complete(folder: Path) -> None:
    loaded = AtomicCheckpointIO().load_checkpoint(folder / "step=1.ckpt")
    assert torch.equal(loaded["weights"], torch.full((5000,), float(loaded["i"])))
    tensors, metadata = load_decomposition(folder / "decomposition")
    assert torch.equal(tensors["V"], torch.full((5000,), float(metadata["i"])))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_killed_writer_always_leaves_complete_files(tmp_path: Path):
    delays = random.Random(0)
    for _ in range(10):
        writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path,))
        writer.start()
        while not (tmp_path / "decomposition").exists():
            time.sleep(0.01)
        time.sleep(delays.uniform(0.02, 0.1))
        writer.kill()
        writer.join()
        assert_complete(tmp_path)
        assert latest_checkpoint(tmp_path) == tmp_path / "step=1.ckpt"
    save_decomposition(tmp_path / "decomposition", {}, {})
    assert sorted(os.listdir(tmp_path)) == ["decomposition", "step=1.ckpt"]


def replace_and_die(folder: Path, die_at: int) -> None:
    """Replace the decomposition, but end without any cleanup at the `die_at`-th call that touches the disk's names."""
    calls = itertools.count(1)

    def deadly(function: Any) -> Any:
        return lambda *args: os._exit(9) if next(calls) == die_at else function(*args)

    os.rename, os.fsync, storage.remove = deadly(os.rename), deadly(os.fsync), deadly(storage.remove)
    save_decomposition(folder, {"V": torch.ones(3)}, {"version": "new"})
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_death_at_any_moment_of_replacing_a_folder_leaves_the_old_or_the_new_one(tmp_path: Path):
    save_decomposition(tmp_path / "d", {"V": torch.ones(3)}, {"version": "old"})
    deaths = []
    for die_at in range(1, 30):
        writer = multiprocessing.get_context("fork").Process(target=replace_and_die, args=(tmp_path / "d", die_at))
        writer.start()
        writer.join()
        deaths.append((writer.exitcode, load_decomposition(tmp_path / "d")[1]["version"]))
        if writer.exitcode == 0:
            break
    assert deaths[0] == (9, "old") and deaths[-1] == (0, "new") and len(deaths) > 6
    assert os.listdir(tmp_path) == ["d"]


def decomposition() -> tuple[dict[str, Tensor], dict[str, Any]]:
    tied = torch.arange(6.0).reshape(2, 3)
    tensors = {"a.V": tied, "a.U": tied.T, "b.V": torch.ones(2, dtype=torch.bfloat16), "step": torch.tensor(3)}
    return tensors, {"sites": {"a": 3}, "target": "tms"}


def test_a_decomposition_comes_back_equal(tmp_path: Path):
    tensors, metadata = decomposition()
    save_decomposition(tmp_path / "d", tensors, metadata)
    loaded, loaded_metadata = load_decomposition(tmp_path / "d")
    assert loaded.keys() == tensors.keys() and loaded_metadata == metadata
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype


def edit(folder: Path, change: Any) -> None:
    content = json.loads((folder / "metadata.json").read_text())
    change(content)
    (folder / "metadata.json").write_text(json.dumps(content))


def drop(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (drop("metadata.json"), "metadata.json is missing, so .*/d is not a decomposition"),
        (drop("tensors.safetensors"), "tensors.safetensors is missing"),
        (lambda f: truncate(f / "metadata.json"), "metadata.json: truncated or damaged"),
        (lambda f: (f / "metadata.json").write_text("[]"), "its format version is unknown"),
        (lambda f: edit(f, lambda c: c.pop("format_version")), "its format version is unknown"),
        (lambda f: edit(f, lambda c: c.update(format_version=3)), "by a newer pdlightning: .* is 3, .* reads up to 2"),
        (lambda f: edit(f, lambda c: c.update(format_version=0)), "version is 0, and this pdlightning reads 1 to 2"),
        (lambda f: edit(f, lambda c: c.update(format_version="2")), "version is 2, .* is not one of ours"),
        (lambda f: edit(f, lambda c: c.pop("tensors")), "metadata.json is damaged: it has no tensors"),
        (lambda f: edit(f, lambda c: c.update(metadata=[])), "metadata.json is damaged: it has no metadata"),
        (lambda f: (f / "tensors.safetensors").write_bytes(b"abc"), "tensors.safetensors: truncated or damaged"),
        (lambda f: truncate_tensors(f), "tensors.safetensors: truncated or damaged"),
        (lambda f: edit(f, lambda c: c["tensors"]["a.V"].update(shape=[3, 2])), "tensor 'a.V' is .*2, 3.*but .*3, 2"),
        (lambda f: edit(f, lambda c: c["tensors"].pop("a.U")), "tensor 'a.U' is .* but absent in metadata.json"),
    ],
)
def test_a_harmed_decomposition_is_refused_with_a_sentence(tmp_path: Path, harm: Any, expected: str):
    save_decomposition(tmp_path / "d", *decomposition())
    harm(tmp_path / "d")
    with pytest.raises(StorageError, match=expected):
        load_decomposition(tmp_path / "d")


def test_a_changed_weight_is_noticed(tmp_path: Path):
    save_decomposition(tmp_path / "d", *decomposition())
    path = tmp_path / "d" / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match="does not have the checksum in metadata.json: it was changed"):
        load_decomposition(tmp_path / "d")


def truncate_tensors(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def test_metadata_that_is_not_plain_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        save_decomposition(tmp_path / "d", {}, {"x": torch.ones(1)})
    assert os.listdir(tmp_path) == []


def test_the_environment_is_plain_and_survives_without_git(monkeypatch: pytest.MonkeyPatch):
    environment = run_environment()
    assert environment["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(environment)) == environment
    monkeypatch.setenv("PATH", "")
    assert run_environment() == environment | {"git": None}


def test_the_commit_is_that_of_a_checkout_that_tracks_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*words: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "storage.py").write_text("")
    (tmp_path / "other.py").write_text("")
    monkeypatch.setattr(storage, "__file__", str(tmp_path / "storage.py"))
    git("init", "-q")
    git("add", "other.py")
    git("commit", "-qm", "x")
    assert run_environment()["git"] is None
    git("add", "storage.py")
    git("commit", "-qm", "y")
    assert run_environment()["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "storage.py").write_text("changed")
    assert run_environment()["git"]["dirty"] is True
