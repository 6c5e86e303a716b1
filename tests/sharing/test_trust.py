"""What a config from elsewhere may name, and what becomes of one that names more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sharing.test_hub import Exploit

from pdlightning import load_run
from pdlightning.checkpoints import CheckpointError
from pdlightning.sharing.trust import known, of_a_stranger
from pdlightning.storage import StorageError

EXPERIMENTS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"))


def said(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The decomposition of a run, alone, its stored config changed."""
    path = folder / "decomposition" / "metadata.json"
    content = json.loads(path.read_text())
    change(content["metadata"]["config"])
    path.write_text(json.dumps(content))
    return folder / "decomposition"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_we_ship_can_be_shared(composed: Callable[..., dict[str, Any]], experiment: str):
    config = composed(f"experiment={experiment}")
    assert of_a_stranger(config, allow=[], origin="x")["pd"] == config["pd"]


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "torch.load", "torch.hub.load", "torch.nn.Linear", "transformers.AutoModel.from_pretrained",
        "datasets.load_dataset", "lightning.Trainer", "pdlightning.storage.atomic_write_text",
        "pdlightning.storage.remove", "pdlightning.targets.obtain_target", "pdlightning.targets.store.write_target",
        "pdlightning.targets.train_target", "pdlightning.load_run", "pdlightning.modules.site.torch.load",
        "pdlightning.metrics.figures.plt", "pdlightning.schedules.Any", "pdlightning.data.os.system", "", None, 3,
        "pdlightning.metrics.__loader__", "pdlightning.optimization.torch",
    ],
)  # fmt: skip
def test_names_that_a_stranger_may_not_use(name: Any):
    assert not known(name, allow=[])


def test_the_caller_alone_widens_the_list():
    assert known("mine.x.Loss", allow=["mine"]) and not known("mines.Loss", allow=["mine"])
    config = {"allow": ["os", "mine"], "pd": {"_target_": "mine.Thing"}, "logging": {"loggers": {}}}
    with pytest.raises(StorageError, match=r"pd._target_: 'mine.Thing'\nRead that code.*allow=\['package'\]"):
        of_a_stranger(config, allow=[], origin="x")
    assert of_a_stranger(config, allow=["mine"], origin="x")["allow"] == ["mine"]


def test_what_a_config_says_of_this_machine_is_dropped():
    loggers = {"x": {"_target_": "os.system"}}
    config = {"cache_dir": "/home/me", "allow": ["os"], "logging": {"loggers": loggers, "log_every": 3}}
    kept = of_a_stranger(config, allow=[], origin="x")
    assert kept == {"cache_dir": None, "allow": [], "logging": {"loggers": {}, "log_every": 3}}


def write_a_file(config: dict[str, Any]) -> None:
    config["allow"] = ["pathlib", "os", "pdlightning"]
    config["pd"]["output"] = {"_target_": "pathlib.Path.touch", "self": "touched"}


def write_by_ours(config: dict[str, Any]) -> None:
    node = {"_target_": "pdlightning.storage.atomic_write_text", "path": "touched", "content": "x"}
    config["data"]["labels"] = node


def make_a_node(config: dict[str, Any]) -> None:
    text = "{_target_: pdlightning.storage.atomic_write_text, path: touched, content: x}"
    config["data"]["labels"] = "${oc.create:'" + text + "'}"


def import_something(config: dict[str, Any]) -> None:
    config["target"] = {
        "_target_": "pdlightning.targets.language.huggingface_model", "name_or_path": "x", "revision": "main",
        "dtype": "float32", "class_path": "touching.Model",
    }  # fmt: skip


def import_by_name(config: dict[str, Any]) -> None:
    config["metric"]["fast"]["x"] = {"_target_": "touching.Metric"}


@pytest.mark.parametrize("attack", [write_a_file, write_by_ours, make_a_node, import_something, import_by_name])
def test_nothing_outside_the_list_is_imported_or_run(
    attack: Callable[[dict[str, Any]], None], copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "touching.py").write_text("import pathlib\npathlib.Path('touched').touch()\n")
    with pytest.raises(StorageError, match="its config names what is not built for a stranger"):
        load_run(said(copied, attack))
    assert not Path("touched").exists()


@pytest.mark.parametrize("size", [10**8, 10**13])
def test_a_config_that_asks_for_far_too_much_ends_before_the_memory_does(copied: Path, size: int):
    with pytest.raises(StorageError, match="asks for a model far larger than the weights it comes with"):
        load_run(said(copied, lambda config: config["pd"]["ci_fn"].update(hidden=[size])))
    with pytest.raises(StorageError, match="asks for a model far larger than the weights it comes with"):
        load_run(said(copied, lambda config: config["target"]["model"].update(n_hidden=size)))


def test_weights_of_another_model_are_refused_with_the_first_that_differ(copied: Path):
    with pytest.raises(StorageError, match="not those of the model .*\n.*size mismatch for model.ci_fn"):
        load_run(said(copied, lambda config: config["pd"]["ci_fn"].update(hidden=[49])))


def test_the_config_of_ones_own_run_is_trusted_as_it_was_when_it_ran(copied: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(copied.parent)
    (copied.parent / "mine.py").write_text("from pdlightning.metrics import CIL0\nclass MyL0(CIL0): pass\n")
    for change in (lambda c: c["metric"]["fast"].update(x={"_target_": "mine.MyL0", "threshold": 0.5}),
                   lambda c: c.update(allow=["mine"])):  # fmt: skip
        config = yaml.safe_load((copied / "config.yaml").read_text())
        change(config)
        (copied / "config.yaml").write_text(yaml.safe_dump(config))
        said(copied, change)
    assert load_run(copied).config["allow"] == ["mine"]
    alone = shutil.copytree(copied / "decomposition", copied.parent / "alone")
    with pytest.raises(StorageError, match="mine.MyL0"):
        load_run(alone)
    assert load_run(alone, allow=["mine"]).config["allow"] == ["mine"]


def test_a_checkpoint_with_pickled_code_is_refused_and_nothing_of_it_runs(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = copied / "checkpoints" / "step=6.ckpt"
    torch.save({"state_dict": {"x": Exploit("touched")}, "pdlightning_config": {}}, path)
    with pytest.raises(CheckpointError, match="holds Python objects, and loading them could run code"):
        load_run(path)
    with pytest.raises(CheckpointError, match="holds Python objects"):
        (copied / "summary.json").unlink()
        load_run(copied)
    assert not Path("touched").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [("pd.ci_fn", {}), ("pd.losses.stochastic_recon.source", []), ("loss.stochastic_recon", 0), ("target", {})],
)
def test_a_config_that_is_wrong_in_a_strange_way_still_gives_a_sentence(copied: Path, path: str, value: Any):
    def change(config: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            config = config[key]
        config[last] = value

    with pytest.raises(StorageError, match="no decomposition can be built from its config"):
        load_run(said(copied, change))
