"""Runs that were logged to Weights & Biases: a real offline folder, and its real client against a stand-in server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sharing.servers import WandB, running

from pdlightning import load_run
from pdlightning.sharing import wandb_runs
from pdlightning.storage import StorageError

NAMES = ("decomposition/metadata.json", "decomposition/tensors.safetensors")
RUN = ("jane", "pd", "abcd1234")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandB]:
    """The server, and a user who is logged in to it."""
    import wandb

    with running(WandB()) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        wandb.teardown()
        yield server  # type: ignore[misc]
        wandb.teardown()


@pytest.fixture
def logged(wandb: WandB, shared: Path) -> WandB:
    files = {name: (shared / name).read_bytes() for name in NAMES}
    wandb.runs[RUN] = {"output.log": b"words", "config.yaml": b"wandb_version: 1", **files}
    return wandb


def test_a_run_of_the_server_measures_what_was_logged_and_is_fetched_once(logged: WandB, shared: Path):
    loaded = load_run("wandb:jane/pd/abcd1234")
    assert loaded.evaluate() == loaded.summary["metrics"] == load_run(shared).summary["metrics"]
    assert sorted(logged.downloads) == sorted(NAMES)
    for spec in ("jane/pd/abcd1234", "wandb:pd/abcd1234", f"{logged.address}/jane/pd/runs/abcd1234?nw=nwuserjane"):
        assert load_run(spec).folder == loaded.folder
    assert len(logged.downloads) == 2
    assert {path.name for path in loaded.folder.iterdir()} == {"metadata.json", "tensors.safetensors"}


def test_a_run_that_was_logged_again_is_fetched_again(logged: WandB, shared: Path):
    load_run("jane/pd/abcd1234")
    logged.runs[RUN][NAMES[0]] += b"\n"
    assert load_run("jane/pd/abcd1234").step == 6
    assert len(logged.downloads) == 4


def test_an_interrupted_download_leaves_nothing_that_looks_whole(logged: WandB, monkeypatch: pytest.MonkeyPatch):
    content = logged.runs[RUN].pop(NAMES[1])
    with pytest.raises(StorageError, match="jane/pd/abcd1234 of Weights & Biases has no decomposition/tensors"):
        load_run("jane/pd/abcd1234")
    logged.runs[RUN][NAMES[1]] = content[:-5]
    with pytest.raises(StorageError, match="tensors.safetensors: truncated or damaged"):
        load_run("jane/pd/abcd1234")
    logged.runs[RUN][NAMES[1]] = content
    assert load_run("jane/pd/abcd1234").step == 6


def test_without_the_server_the_copy_from_before_is_taken_with_a_warning(
    logged: WandB, monkeypatch: pytest.MonkeyPatch
):
    loaded = load_run("jane/pd/abcd1234")
    monkeypatch.setattr(wandb_runs, "find", unreachable)
    with pytest.warns(UserWarning, match="The copy of jane/pd/abcd1234 from an earlier download is taken"):
        assert load_run("jane/pd/abcd1234").folder == loaded.folder
    with pytest.raises(StorageError, match="no answer"):
        load_run("jane/pd/another")


def unreachable(place: object) -> None:
    raise wandb_runs.Unreachable("no answer.")


def test_a_path_that_does_not_exist_is_said(logged: WandB):
    with pytest.raises(StorageError, match="no run jane/pd/other, or you may not see it: check entity, project and"):
        load_run("jane/pd/other")


def test_a_run_of_something_else_is_said(logged: WandB):
    logged.runs[("jane", "pd", "else")] = {"output.log": b"", "model.pt": b"\x80\x04"}
    with pytest.raises(StorageError, match="jane/pd/else of Weights & Biases has no decomposition/metadata.json"):
        load_run("jane/pd/else")
    assert not logged.downloads


NOBODY = """
import os
import wandb
from pdlightning.sharing import places, wandb_runs
for key in ("", "a" * 40):
    os.environ["WANDB_API_KEY"] = key
    wandb.teardown()
    try:
        wandb_runs.fetch(places.place_of("a/b/c"))
    except places.StorageError as error:
        print(error)
"""


def test_no_key_and_no_network_are_said(tmp_path: Path):
    """In a process of its own: wandb keeps what it knows of a user."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and not k.lower().endswith("_proxy")}
    here = {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    run = subprocess.run(
        [sys.executable, "-c", NOBODY], env={**kept, **here}, cwd=tmp_path,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    no_key, no_network = run.stdout.splitlines()
    assert "no key for Weights & Biases on this machine. Log in with `wandb login`" in no_key
    assert "wandb:a/b/c cannot be fetched: http://127.0.0.1:9 does not answer" in no_network


def test_a_real_offline_folder_is_loaded(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import wandb

    run = wandb.init(
        mode="offline", project="pd", dir=str(tmp_path), settings=wandb.Settings(silent=True, console="off")
    )
    for name in NAMES:
        path = Path(run.dir) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((shared / name).read_bytes())
        run.save(str(path), base_path=run.dir, policy="now")
    run.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    loaded = load_run(folder)
    assert loaded.evaluate() == load_run(shared).summary["metrics"]
    assert load_run(str(folder / "files")).step == loaded.step == 6
