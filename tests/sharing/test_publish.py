"""The folder that is uploaded: its card, and the command that makes the run again."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdlightning import load_run, share
from pdlightning.config import to_plain
from pdlightning.sharing.card import model_card
from pdlightning.sharing.publish import write_shared
from pdlightning.sharing.reproduce import ELSEWHERE, command_of, composed, without
from pdlightning.storage import METADATA, StorageError


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["share", *map(str, words)])
    share.main()


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "decomposition" / METADATA).read_text())


def test_what_would_be_uploaded_can_be_looked_at_and_loaded(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command(monkeypatch, shared, "jane/tms", "--to", tmp_path / "look")
    assert f"What would be uploaded is in {tmp_path / 'look'}" in capsys.readouterr().out
    for place in ("", "decomposition"):
        assert load_run(tmp_path / "look" / place).evaluate() == load_run(shared).summary["metrics"]


def test_the_card_says_what_was_decomposed_the_numbers_and_how_to_load_it(shared: Path, tmp_path: Path):
    write_shared(shared, tmp_path / "look", repo_id="jane/tms")
    _, head, text = (tmp_path / "look" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "pdlightning" and "tms_5-2" in yaml.safe_load(head)["tags"]
    assert "`TMS(n_features=5, n_hidden=2, tied=true)`" in text
    assert "| `linear1` | linear | 5 | 2 | 6 |" in text and "`SharedMLP(hidden=[50])`" in text
    metrics = load_run(shared).summary["metrics"]
    assert f"| match_linear1/mmcs | {metrics['eval/match_linear1/mmcs']:.4g} | >= 0.999 | MISSED |" in text
    assert all(f"| {name} | {value:.4g} |" in text for name, value in metrics.items())
    assert 'run = load_run("jane/tms")' in text
    assert content_of(shared)["metadata"]["environment"]["git"]["commit"] in text
    assert "This run missed goals of its experiment" in text


def test_the_lines_of_the_card_that_load_it_run(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_shared(shared, Path("look"))
    lines = Path("look/README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(lines, found)
    assert found["run"].step == 6


def test_a_hub_target_is_the_base_model_and_its_weights_are_said_to_be_elsewhere(shared: Path):
    content = content_of(shared)
    source = {"name_or_path": "openai-community/gpt2", "revision": "main", "commit": "607a"}
    content["metadata"]["target"] = {"weights": "hub", "loaded_from": source, "sha256": "0"}
    card = model_card(content, load_by="x")
    assert "base_model: openai-community/gpt2\n" in card and "at revision main (commit 607a); its weights" in card
    assert "The weights of the target come from elsewhere" in card
    content["metadata"]["target"]["loaded_from"] = {"name_or_path": "/a/folder", "revision": None, "commit": None}
    assert "base_model" not in model_card(content, load_by="x")


def test_a_card_of_the_first_format_says_what_was_not_recorded(shared: Path):
    card = model_card(content_of(Path(__file__).parent / "format_1"), load_by="x")
    assert "Commit of pdlightning: `not recorded`" in card and "its weights are in this repository" in card


@pytest.mark.parametrize(
    "words",
    [
        "experiment=tms_5-2",
        "experiment=tms_5-2 seed=3 steps=300 loss.importance_minimality.coeff=1e-4 data.batch_size=7",
        "experiment=tms_5-2 steps=100 metric=none",
        "experiment=tms_5-2 ci_fn=scalar_mlp ~loss.stochastic_recon runtime.threads=null",
        "experiment=resid_mlp2 debug=fast pd.squash=sigmoid target_steps=7",
        "experiment=tms_5-2 loss=[faithfulness,importance_minimality,pgd_recon] cache_dir='/a b'",
        "experiment=lm_tiny logging=tensorboard allow=[mine] target.model.n_layers=3",
    ],
)
def test_the_command_composes_to_the_config(composed_of_tree: Callable[..., dict[str, Any]], words: str):
    config = composed_of_tree(*shlex.split(words))
    found = command_of(config)
    assert found is not None
    python, _, module, *again = shlex.split(found)
    assert (python, module) == ("python", "pdlightning") and composed(again) == without(config, ELSEWHERE)


@pytest.fixture
def composed_of_tree() -> Callable[..., dict[str, Any]]:
    from hydra import compose, initialize_config_dir

    from pdlightning.__main__ import CONF

    def make(*words: str) -> dict[str, Any]:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = to_plain(compose("config", list(words)))
        del config["resume"]
        return config

    return make


def test_without_a_command_the_card_gives_the_config(shared: Path):
    content = content_of(shared)
    content["metadata"]["config"]["name"] = "my own"
    assert command_of(content["metadata"]["config"]) is None
    assert "run(yaml.safe_load(open('config.yaml')), pathlib.Path('again'))" in model_card(content, load_by="x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{run}/checkpoints/step=3.ckpt", "a/b"), r"\(CheckpointFile\) cannot be shared: give the folder of a run.$"),
        (("jane/tms", "a/b"), r"jane/tms \(HubRepo\) cannot be shared"),
        (("{run}", "tms"), "'tms' is no name on the hub: expected user/name"),
        (("{run}", "a/b", "--to", "{run}"), "is not empty: choose another folder"),
        (("{run}", "a/b"), "a/b could not be put on http://127.0.0.1:9: .*Connection refused"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    shared: Path, words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(SystemExit, match=message):
        command(monkeypatch, *(word.format(run=shared) for word in words))


def test_a_run_that_has_not_ended_or_is_damaged_is_not_shared(copied: Path, tmp_path: Path):
    (copied / "summary.json").rename(tmp_path / "summary.json")
    with pytest.raises(StorageError, match="has not ended, so there is nothing to share yet. Go on with it: python -m"):
        write_shared(copied, tmp_path / "look")
    (tmp_path / "summary.json").rename(copied / "summary.json")
    path = copied / "decomposition" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match="truncated or damaged"):
        write_shared(copied, tmp_path / "look")
    assert not (tmp_path / "look").exists()


def test_folders_of_this_machine_are_not_told(copied: Path, tmp_path: Path):
    path = copied / "decomposition" / METADATA
    content = json.loads(path.read_text())
    content["metadata"]["config"].update(init_from="/home/jane/outputs/first", cache_dir="/home/jane/cache")
    content["metadata"]["summary"]["init_from"] = "/home/jane/outputs/first"
    path.write_text(json.dumps(content))
    (copied / "report.html").unlink()
    write_shared(copied, tmp_path / "look")
    files = [path for path in (tmp_path / "look").rglob("*") if path.is_file()]
    assert len(files) == 5 and not any(b"/home/jane" in path.read_bytes() for path in files)
    assert "the ci function of another run, first" in (tmp_path / "look" / "README.md").read_text()
