"""Every place on this machine that a run can be loaded from, at every step, on every format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
import yaml
from run.conftest import rows_of, summary_of

from pdlightning import ParameterDecomposition, load_run
from pdlightning.run import run
from pdlightning.storage import METADATA, StorageError

STORED = sorted(Path(__file__).parent.glob("format_*"))


def test_what_a_decomposition_says_of_itself(shared: Path):
    content = json.loads((shared / "decomposition" / METADATA).read_text())
    assert content["format_version"] == 2
    metadata = content["metadata"]
    assert metadata.keys() == {"sites", "ci_fn", "target", "config", "summary", "environment"}
    assert metadata["sites"]["linear1"] == {"kind": "linear", "d_in": 5, "d_out": 2, "C": 6}
    assert metadata["ci_fn"] == {"_target_": "pdlightning.modules.SharedMLP", "hidden": [50]}
    assert metadata["target"]["weights"] == "included" and "target.linear1.weight" in content["tensors"]
    assert metadata["summary"] == summary_of(shared)
    assert metadata["environment"].keys() == {"versions", "platform", "git"}  # and no name of a machine
    assert metadata["config"] == yaml.safe_load((shared / "config.yaml").read_text())


def test_a_decomposition_alone_is_the_run(shared: Path, tmp_path: Path):
    alone = shutil.copytree(shared / "decomposition", tmp_path / "received")
    loaded = load_run(alone)
    assert (loaded.folder, loaded.step, loaded.summary) == (alone, 6, summary_of(shared))
    assert loaded.evaluate() == loaded.summary["metrics"]


@pytest.mark.parametrize("step", [3, 6])
def test_a_checkpoint_is_loaded_by_its_name_or_its_step(shared: Path, step: int):
    row = {name: float(value) for name, value in rows_of(shared)[step].items() if name.startswith("eval/")}
    by_name = load_run(shared / "checkpoints" / f"step={step}.ckpt")
    by_step = load_run(shared, step=step)
    assert row and by_name.step == by_step.step == step
    for loaded in (by_name, by_step):
        measured = loaded.evaluate()
        assert row == {name: measured[name] for name in row}


def test_a_checkpoint_needs_no_target_from_the_cache(copied: Path, tmp_path: Path):
    old = load_run(copied).config["cache_dir"]
    for name in ("config.yaml", "decomposition/metadata.json"):
        text = (copied / name).read_text()
        (copied / name).write_text(text.replace(old, str(tmp_path / "empty")))
    content = torch.load(copied / "checkpoints" / "step=3.ckpt", weights_only=True)
    content["pdlightning_config"]["cache_dir"] = str(tmp_path / "empty")
    torch.save(content, copied / "checkpoints" / "step=3.ckpt")
    assert load_run(copied, step=3).step == 3 and not (tmp_path / "empty").exists()


def test_from_pretrained_gives_the_decomposition_in_eval_mode_on_the_device(shared: Path):
    decomposition = ParameterDecomposition.from_pretrained(str(shared), device="cpu")
    assert isinstance(decomposition, ParameterDecomposition) and not decomposition.training
    on_meta = ParameterDecomposition.from_pretrained(shared, device="meta")
    assert {p.device.type for p in [*on_meta.parameters(), *on_meta.target.parameters()]} == {"meta"}


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
def test_a_stored_old_run_loads_and_measures_what_it_did(folder: Path):
    for place in (folder, folder / "decomposition"):
        loaded = load_run(place)
        assert loaded.step == 6
        assert loaded.evaluate() == pytest.approx(loaded.summary["metrics"], rel=1e-3, abs=1e-6)


def test_every_format_so_far_is_among_the_stored_runs():
    from pdlightning.storage import FORMAT_VERSION

    assert [folder.name for folder in STORED] == [f"format_{n + 1}" for n in range(FORMAT_VERSION)]


@pytest.fixture(scope="session")
def of_untrained(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decomposition of a target that the config makes, so that its weights are not stored."""
    folder = tmp_path_factory.mktemp("untrained") / "run"
    config = tiny()
    config["target"] = {
        "_target_": "pdlightning.targets.TMS", "n_features": 5, "n_hidden": 2, "tied": True, "seed": 3
    }  # fmt: skip
    config["metric"]["slow"] = {}
    run(config, folder)
    return folder / "decomposition"


def test_a_target_that_is_not_stored_is_made_again_and_must_be_the_same(of_untrained: Path, tmp_path: Path):
    assert json.loads((of_untrained / METADATA).read_text())["metadata"]["target"]["weights"] == "config"
    loaded = load_run(of_untrained)
    assert loaded.evaluate() == loaded.summary["metrics"]
    copied = shutil.copytree(of_untrained, tmp_path / "copy")
    content = json.loads((copied / METADATA).read_text())
    content["metadata"]["config"]["target"]["seed"] = 4
    (copied / METADATA).write_text(json.dumps(content))
    with pytest.raises(StorageError, match="its target has other weights now than when it was decomposed"):
        load_run(copied)
    content["metadata"]["config"]["target"]["n_hidden"] = 10**13
    (copied / METADATA).write_text(json.dumps(content))
    with pytest.raises(StorageError, match="asks for a model far larger than the weights"):
        load_run(copied)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def not_ours(folder: Path) -> None:
    torch.save({"state_dict": {}}, folder / "checkpoints" / "step=3.ckpt")


@pytest.mark.parametrize(
    ("harm", "place", "arguments", "message"),
    [
        (None, "", {"step": 4}, r"has no checkpoint of step 4. It has 3, 6 \(logging.checkpoints_kept says"),
        (None, "decomposition", {"step": 3}, "has the weights after its last step, 6, alone, and not those after 3"),
        (None, "checkpoints/step=3.ckpt", {"step": 6}, "is the checkpoint of step 3, and step=6 was asked for"),
        (None, "checkpoints/step=9.ckpt", {}, "There is no .*step=9.ckpt"),
        (None, "checkpoints", {}, "checkpoints is not the folder of a run: it has no config.yaml"),
        (without("config.yaml"), "checkpoints/step=3.ckpt", {}, "is not in the checkpoints/ of a run .* cannot be lo"),
        (not_ours, "", {"step": 3}, "step=3.ckpt is not a checkpoint of pdlightning"),
        (without("decomposition/metadata.json"), "decomposition", {}, "metadata.json is missing"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_a_sentence(
    copied: Path, harm: Any, place: str, arguments: dict[str, Any], message: str
):
    if harm is not None:
        harm(copied)
    with pytest.raises(StorageError, match=message):
        load_run(str(copied / place), **arguments)


@pytest.mark.parametrize("device", ["cuda:97", "gpu"])
def test_a_device_that_is_not_there_is_said(shared: Path, device: str):
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used here: "):
        load_run(shared, device=device)


def test_loading_is_quick(shared: Path):
    """The goal is 2 s after imports; CPU time, for others may be at work on this machine."""
    load_run(shared)
    start = process_time()
    load_run(shared)
    assert process_time() - start < 2
