"""What a path, a name or an address means."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlightning.sharing.places import (
    CheckpointFile,
    DecompositionFolder,
    HubRepo,
    RunFolder,
    WandBRun,
    place_of,
)
from pdlightning.storage import StorageError

RUN, REPO = WandBRun("jane", "my project", "abcd1234"), HubRepo("jane/tms", None)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_ENDPOINT")


@pytest.mark.parametrize(
    "spec",
    [
        "wandb:jane/my project/abcd1234",
        "jane/my project/abcd1234",
        "jane/my project/runs/abcd1234",
        "wandb:jane/my project/runs/abcd1234",
        "https://wandb.ai/jane/my%20project/runs/abcd1234",
        "https://wandb.ai/jane/my%20project/runs/abcd1234?nw=nwuserjane",
        "https://www.wandb.ai/jane/my%20project/runs/abcd1234/overview#x",
        "https://forge.coreweave.com/wandb/jane/my%20project/runs/abcd1234",
    ],
)
def test_every_spelling_of_a_run_of_wandb(spec: str):
    assert place_of(spec) == RUN


@pytest.mark.parametrize("spec", ["wandb:my project/abcd1234", "wandb:my project/runs/abcd1234"])
def test_without_an_entity_it_is_the_default_one(spec: str):
    assert place_of(spec) == WandBRun(None, "my project", "abcd1234")


@pytest.mark.parametrize(
    "spec", ["jane/tms", "hf:jane/tms", "https://huggingface.co/jane/tms", "http://hf.co/jane/tms/", "hf:jane/tms"]
)
def test_every_spelling_of_a_repository(spec: str):
    assert place_of(spec) == REPO


@pytest.mark.parametrize("spec", ["jane/tms@a/b", "hf:jane/tms@a/b", "https://huggingface.co/jane/tms/tree/a/b"])
def test_a_revision_of_a_repository(spec: str):
    assert place_of(spec) == HubRepo("jane/tms", "a/b")


def test_a_server_of_ones_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert place_of("https://wandb.example.org/jane/p/runs/a") == WandBRun("jane", "p", "a")
    with pytest.raises(StorageError, match="another server .* set WANDB_BASE_URL=https://wandb.ai"):
        place_of("https://wandb.ai/jane/p/runs/a")
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    assert place_of("https://wandb.ai/jane/p/runs/a") == WandBRun("jane", "p", "a")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org")
    assert place_of("https://hub.example.org/jane/tms") == REPO


def make(*files: str) -> None:
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("")


def test_what_is_on_this_machine_comes_first():
    make("jane/tms/config.yaml", "jane/p/run/decomposition/metadata.json", "jane/tms/checkpoints/step=4.ckpt")
    assert place_of("jane/tms") == RunFolder(Path("jane/tms"))
    assert place_of("jane/p/run/decomposition") == DecompositionFolder(Path("jane/p/run/decomposition"))
    assert place_of("jane/tms/checkpoints/step=4.ckpt") == CheckpointFile(Path("jane/tms/checkpoints/step=4.ckpt"))
    assert place_of("hf:jane/tms") == REPO


def test_a_folder_of_wandb_holds_the_decomposition_among_its_files():
    make("wandb/offline-run-20260131_120000-abcd/files/decomposition/metadata.json", "wandb/run-x/files/output.log")
    folder = Path("wandb/offline-run-20260131_120000-abcd")
    expected = DecompositionFolder(folder / "files" / "decomposition")
    assert place_of(folder) == place_of(str(folder)) == place_of(folder / "files") == expected
    with pytest.raises(StorageError, match="run-x looks like a run of Weights & Biases, but .* has not ended"):
        place_of("wandb/run-x")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tms", "'tms' names no run: .*\n  a run folder"),
        ("a/b/c/d/e", "names no run"),
        ("", "is not the folder of a run"),
        ("/no/where", "There is no /no/where"),
        ("./a/b", "There is no .*/a/b"),
        ("~/no/where", "There is no /.*/no/where"),
        ("outputs/tms_5-2/2026-01-31", "There is no .*/outputs/tms_5-2/2026-01-31"),
        ("outputs/tms", "There is no .*/outputs/tms"),
        ("a/step=4.ckpt", "There is no .*/a/step=4.ckpt"),
        (Path("a/b"), "There is no .*/a/b"),
        ("outputs", "has no config.yaml. It holds runs, choose one of them: one, two"),
        ("lone", "Its decomposition/ can be loaded by itself: lone/decomposition"),
        ("empty/x", "not the folder of a run.* If you mean one elsewhere, write hf:empty/x or wandb:empty/x"),
        ("outputs/one/config.yaml", "is a file: a run is named by its folder"),
        ("wandb:jane/p/../x", "is no run of Weights & Biases: expected entity/project/run_id"),
        ("wandb:../p/x", "is no run of Weights & Biases"),
        ("wandb:x", "is no run of Weights & Biases"),
        ("wandb:a/b/c/d", "is no run of Weights & Biases"),
        ("hf:jane", "is no name on the hub: expected user/name"),
        ("hf:../tms", "is no name on the hub"),
        ("hf:jane/tms@../x", "is no name on the hub"),
        ("https://huggingface.co/datasets/jane/tms", "not the page of a model on the hub"),
        ("https://huggingface.co/jane", "not the page of a model on the hub: expected huggingface.co/user/name"),
        ("https://wandb.ai/jane/p", "not the page of a run. Expected https://wandb.ai/entity/project/runs/run_id"),
        ("https://example.org/jane/p/runs/x", "on another server .* set WANDB_BASE_URL=https://example.org"),
        ("https://wandb.ai/../p/runs/x", "is no run of Weights & Biases"),
    ],
)
def test_what_names_no_run_is_refused_with_a_sentence(spec: str | Path, message: str):
    make("outputs/one/config.yaml", "outputs/two/config.yaml", "lone/decomposition/metadata.json", "empty/x/y")
    make("outputs/one/environment.json", "outputs/two/checkpoints/step=4.ckpt", "outputs/conf/config.yaml")
    with pytest.raises(StorageError, match=message):
        place_of(spec)
