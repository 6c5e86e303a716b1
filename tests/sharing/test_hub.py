"""Runs that go to the hub and come back from it, through a stand-in on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sharing.conftest import use_hub
from sharing.servers import COMMIT, Hub

from pdlightning import ParameterDecomposition, load_run
from pdlightning.storage import StorageError

NAME = "jane/tms"


@pytest.fixture
def pushed(hub: Hub, shared: Path) -> Hub:
    load_run(shared).push_to_hub(NAME, token=hub.writer)
    return hub


def test_what_is_pushed_comes_back_and_measures_the_same_bit_for_bit(pushed: Hub, shared: Path):
    loaded, here = load_run(NAME), load_run(shared)
    assert loaded.evaluate() == loaded.summary["metrics"] == here.summary["metrics"]
    state = here.decomposition.state_dict()
    assert state.keys() == loaded.decomposition.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.decomposition.state_dict().items())
    assert not loaded.decomposition.training and loaded.step == 6


def test_a_push_holds_the_decomposition_the_card_and_nothing_of_this_machine(pushed: Hub, shared: Path):
    files = pushed.repos[NAME]
    decomposition = {"decomposition/tensors.safetensors", "decomposition/metadata.json"}
    assert files.keys() == decomposition | {"README.md", "config.yaml", "summary.json", "report.html"}
    assert files["decomposition/tensors.safetensors"] in pushed.lfs.values()
    config = yaml.safe_load(files["config.yaml"])
    assert config["cache_dir"] is None and load_run(shared).config["cache_dir"] is not None
    here = load_run(shared).config["cache_dir"].encode()
    assert not any(here in content for content in files.values())


def test_a_run_without_a_report_is_pushed_without_one(hub: Hub, copied: Path):
    (copied / "report.html").unlink()
    load_run(copied).push_to_hub(NAME, token=hub.writer)
    assert "report.html" not in hub.repos[NAME]


@pytest.mark.parametrize("spelling", ["{}", "hf:{}", "{}@main", "{}@" + COMMIT, "address", "address/tree/main"])
def test_every_spelling_of_a_name_loads(pushed: Hub, spelling: str):
    spec = spelling.replace("address", f"{pushed.address}/{NAME}").format(NAME)
    assert list(ParameterDecomposition.from_pretrained(spec).components) == ["linear1", "linear2"]


def test_a_second_load_fetches_nothing_and_needs_no_network(pushed: Hub, monkeypatch: pytest.MonkeyPatch, caplog):
    load_run(NAME)
    fetched = [line for line in pushed.requests if "GET" in line and "/resolve/" in line]
    assert len(fetched) == 2
    load_run(NAME)
    assert [line for line in pushed.requests if "GET" in line and "/resolve/" in line] == fetched
    use_hub("http://127.0.0.1:9", monkeypatch)
    with pytest.warns(UserWarning, match="does not answer .*The copy of jane/tms in the cache is taken"):
        assert load_run(NAME).step == 6


def test_an_existing_folder_comes_before_a_name(pushed: Hub, copied: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(copied.parent)
    Path("jane").mkdir()
    copied.rename("jane/tms")
    before = list(pushed.requests)
    assert load_run(NAME).folder == Path(NAME) and pushed.requests == before
    assert load_run(f"hf:{NAME}").folder != Path(NAME) and pushed.requests != before


def test_private_makes_a_private_repository_and_a_second_push_replaces_the_first(hub: Hub, shared: Path):
    run = load_run(shared)
    run.push_to_hub(NAME, private=True, token=hub.writer)
    assert hub.private == {NAME}
    hub.repos[NAME]["README.md"] = b"old"
    assert run.push_to_hub(NAME, private=True, token=hub.writer) == f"{hub.address}/{NAME}/commit/{COMMIT}"
    assert hub.repos[NAME]["README.md"].startswith(b"---\nlibrary_name: pdlightning")


def test_a_token_that_may_not_write_is_said(hub: Hub, shared: Path):
    with pytest.raises(StorageError, match="does not let us write to jane/tms: log in with `hf auth login`"):
        load_run(shared).push_to_hub(NAME, token="hf_wrong")
    assert not hub.repos


OTHERS = {"config.json": b"{}", "model.safetensors": b"", "pytorch_model.bin": b"\x80\x04cos\nsystem\n"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jane/other", "has no model jane/other: check the name"),
        ("jane/tms@v2", "jane/tms has no revision v2"),
        ("hf:jane", "'jane' is no name on the hub: expected user/name"),
        ("hf:jane/../x", "is no name on the hub"),
    ],
)
def test_a_name_that_is_not_there_is_said(pushed: Hub, spec: str, message: str):
    with pytest.raises(StorageError, match=message):
        load_run(spec)


def test_a_hub_id_of_something_else_is_refused_and_nothing_of_it_is_fetched(hub: Hub):
    hub.repos["openai/gpt2"] = OTHERS
    with pytest.raises(StorageError, match="openai/gpt2 on the hub is not a decomposition .*pytorch_model.bin"):
        load_run("openai/gpt2")
    assert not any("/resolve/" in line for line in hub.requests)


def test_no_network_is_said_with_what_to_do():
    with pytest.raises(StorageError, match=r"127.0.0.1:9 does not answer .*can be loaded by its path"):
        load_run(NAME)


def metadata(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes]], None]:
    def harm(files: dict[str, bytes]) -> None:
        content = json.loads(files["decomposition/metadata.json"])
        change(content)
        files["decomposition/metadata.json"] = json.dumps(content).encode()

    return harm


def truncated(files: dict[str, bytes]) -> None:
    files["decomposition/tensors.safetensors"] = files["decomposition/tensors.safetensors"][:-10]


def pickled(files: dict[str, bytes]) -> None:
    import pickle

    files["decomposition/tensors.safetensors"] = pickle.dumps(Exploit("touched"))


class Exploit:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (metadata(lambda c: c.update(format_version=99)), "by a newer pdlightning.*Upgrade: pip install -U"),
        (truncated, "tensors.safetensors: truncated or damaged"),
        (pickled, "tensors.safetensors: truncated or damaged"),
        (metadata(lambda c: c["tensors"]["model.components.linear1.V"].update(shape=[5, 10**9])), "was changed"),
        (metadata(lambda c: c["metadata"]["sites"]["linear1"].update(C=10**9)), "V of site linear1 is"),
        (metadata(lambda c: c["metadata"]["config"]["pd"]["sites"].update(linear1=10**9)), "its config says"),
        (metadata(lambda c: c["metadata"].pop("config")), "its metadata has no config"),
        (metadata(lambda c: c["metadata"]["target"].pop("seed")), "has no target.seed"),
        (metadata(lambda c: c["metadata"]["summary"].update(steps=7)), "its summary says 7 steps"),
    ],
)
def test_a_harmed_download_is_refused_with_a_sentence(
    pushed: Hub, harm: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    harm(pushed.repos[NAME])
    with pytest.raises(StorageError, match=message):
        load_run(NAME)
    assert not Path("touched").exists()
