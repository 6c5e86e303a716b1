"""`init_from=RUN`: a run that starts with the V, U and ci function of another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run.conftest import rows_of, summary_of, tensors_of
from safetensors.torch import load_file, save_file

from pdlightning import ParameterDecomposition, finetune, load_run
from pdlightning.config import ConfigError
from pdlightning.finetune import ci_fn_differences, site_differences
from pdlightning.resume import unfinished_run
from pdlightning.run import run
from pdlightning.storage import StorageError, weights_sha256

Tiny = Callable[..., dict[str, Any]]
OTHER = "loss.stochastic_recon.coeff=0.5"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What fine-tuning says."""
    words: list[str] = []
    monkeypatch.setattr(finetune, "rank_zero_info", words.append)
    return words


def from_run(tiny: Tiny, folder: Path, *words: str) -> dict[str, Any]:
    return {**tiny(*words), "init_from": str(folder)}


def test_it_starts_where_the_other_run_ended(finished: Path, tiny: Tiny, tmp_path: Path, said: list[str]):
    run(from_run(tiny, finished, OTHER), tmp_path / "tuned")
    start, end = rows_of(tmp_path / "tuned")[0], rows_of(finished)[6]
    # The importance penalty and its coefficient are scheduled, and begin again; so does the total.
    same = {name for name in start if name.startswith("eval/")} - {"eval/loss/importance_minimality", "eval/loss/total"}
    assert len(same) > 20 and {n: start[n] for n in same} == {n: end[n] for n in same}
    assert any(rows_of(tmp_path / "tuned")[6][name] != end[name] for name in same), "and goes on from there"
    assert summary_of(tmp_path / "tuned")["init_from"] == str(finished) and summary_of(finished)["init_from"] is None
    assert "after its 6 steps; there is no faithfulness warmup" in said[0] and len(said) == 1


def test_a_decomposition_away_from_its_run_will_do(finished: Path, tiny: Tiny, tmp_path: Path):
    """As it comes from the hub: a stranger's, of which nothing is built."""
    shared = shutil.copytree(finished / "decomposition", tmp_path / "decomposition")
    start = finetune.start_of(from_run(tiny, shared))
    assert start is not None and not start.stored.own and start.stored.step == 6
    decomposition = load_run(finished).decomposition
    start.check(decomposition, tiny())
    metadata = json.loads((shared / "metadata.json").read_text())
    metadata["metadata"]["config"]["pd"]["ci_fn"]["_target_"] = "os.system"
    (shared / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(StorageError, match="os.system"):
        finetune.start_of(from_run(tiny, shared))


def test_what_was_tuned_no_longer_needs_what_it_came_from(finished: Path, tiny: Tiny, tmp_path: Path):
    """Resumed, it goes on from its own checkpoint, and ends as if it had not been interrupted."""
    config = from_run(tiny, tmp_path / "source", OTHER)
    shutil.copytree(finished, tmp_path / "source")
    run(config, tmp_path / "tuned")
    shutil.rmtree(tmp_path / "source")
    shutil.copytree(tmp_path / "tuned", tmp_path / "again")
    (tmp_path / "again" / "summary.json").unlink()
    (tmp_path / "again" / "checkpoints" / "step=6.ckpt").unlink()
    run(config, tmp_path / "again", resume=True)
    assert tensors_of(tmp_path / "again") == tensors_of(tmp_path / "tuned")
    assert summary_of(tmp_path / "again")["init_from"] == str(tmp_path / "source")
    assert load_run(tmp_path / "again").evaluate() == summary_of(tmp_path / "tuned")["metrics"]


def test_another_target_of_the_same_shape_is_allowed_and_said(
    finished: Path, tiny: Tiny, tmp_path: Path, said: list[str]
):
    run(
        from_run(tiny, finished, "target.seed=7", "logging.eval_every=100", "logging.slow_eval_every=100"),
        tmp_path / "r",
    )
    there, here = (summary_of(folder)["target"]["sha256"] for folder in (finished, tmp_path / "r"))
    assert there != here
    assert said[1:] == [
        f"The target is not the one they were made for: sha256 of its weights {there[:12]} there, {here[:12]} here."
    ]


def test_all_that_differs_is_listed_before_the_target_is_trained(finished: Path, tiny: Tiny, tmp_path: Path):
    words = ("pd.sites.linear1=8", "target=tms_5-2-id", "ci_fn.hidden=[3]", "pd.squash=sigmoid")
    config = from_run(tiny, finished, *words, "+pd.sites={hidden_layers.0: 2}")
    config["cache_dir"] = str(tmp_path / "cache")
    with pytest.raises(ConfigError) as error:
        run(config, tmp_path / "run")
    hidden = tiny()["pd"]["ci_fn"]["hidden"]
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "site linear1: C 6 there, 8 here",
        "site hidden_layers.0: only here",
        "squash leaky_hard there, sigmoid here",
        f"ci_fn: hidden {hidden} there, [3] here",
    ]
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_only_what_changes_the_function_counts_as_a_difference():
    node = {"_target_": "a.B", "hidden": [3]}
    defaults = {"rope_base": 1.0, "checkpoint_activations": False}
    assert not list(ci_fn_differences(node, {**node, "rope_base": 1.0, "checkpoint_activations": True}, defaults))
    assert list(ci_fn_differences(node, {**node, "rope_base": 2.0}, defaults)) == [
        "ci_fn: rope_base 1.0 there, 2.0 here"
    ]
    assert list(ci_fn_differences(node, {"_target_": "a.C", "h": 1}, {})) == ["ci_fn a.B there, a.C here"]
    one, other = {"a": {"C": 1}, "b": {"C": 2}}, {"b": {"C": 2}, "a": {"C": 1}}
    assert list(site_differences(one, other)) == ["sites in the order a, b there, b, a here"]


def test_a_tensor_of_another_shape_is_found_where_the_settings_agree(finished: Path, tiny: Tiny, tmp_path: Path):
    start = finetune.start_of(from_run(tiny, finished))
    assert start is not None
    decomposition = load_run(finished).decomposition
    start.stored.state["model.components.linear1.V"] = torch.zeros(5, 7)
    del start.stored.state["model.components.linear2.U"]
    with pytest.raises(ConfigError) as error:
        start.check(decomposition, tiny())
    assert "components.linear1.V (5, 7) there, (5, 6) here" in str(error.value)
    assert "components.linear2.U absent there, (6, 5) here" in str(error.value)


def harmed(folder: Path) -> None:
    path = folder / "decomposition" / "tensors.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda f: shutil.rmtree(f), ConfigError, "init_from: There is no /"),
        (lambda f: (f / "config.yaml").unlink(), ConfigError, "init_from: .* has no config.yaml"),
        (
            lambda f: (f / "summary.json").unlink(),
            ConfigError,
            "has not ended.*first: python -m pdlightning resume=",
        ),
        (harmed, StorageError, "does not have the checksum"),
    ],
)
def test_what_is_no_finished_run_is_refused(
    finished: Path, tiny: Tiny, tmp_path: Path, harm: Callable[[Path], None], error: type[Exception], message: str
):
    folder = Path(shutil.copytree(finished, tmp_path / "source"))
    harm(folder)
    with pytest.raises(error, match=message):
        run(from_run(tiny, folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resume_auto_knows_what_a_run_started_with(finished: Path, tiny: Tiny, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "runs" / "one")
    (tmp_path / "runs" / "one" / "summary.json").unlink()
    config = load_run(finished).config
    assert unfinished_run(config, tmp_path / "runs") == tmp_path / "runs" / "one"
    assert unfinished_run({**config, "init_from": str(finished)}, tmp_path / "runs") is None


def test_a_run_stored_before_init_from_existed_is_loaded(finished: Path, tiny: Tiny, tmp_path: Path):
    config = tiny()
    del config["init_from"]
    run(config, tmp_path / "old")
    assert load_run(tmp_path / "old").step == 6


def test_the_hash_of_weights_sees_names_types_shapes_and_values():
    def hash_of(**buffers: torch.Tensor) -> str:
        module = torch.nn.Module()
        for name, value in buffers.items():
            module.register_buffer(name, value)
        return weights_sha256(module)

    a = torch.arange(4.0)
    same = hash_of(a=a)
    assert same == hash_of(a=a.clone())
    others = [hash_of(b=a), hash_of(a=a.double()), hash_of(a=a.view(2, 2)), hash_of(a=a + 1), hash_of(a=a.bfloat16())]
    assert len({same, *others}) == 6


def test_nothing_but_v_u_and_the_ci_function_is_taken(finished: Path, tiny: Tiny):
    decomposition: ParameterDecomposition = load_run(finished).decomposition
    names = finetune.taken_of(decomposition)
    assert {name for name, _ in decomposition.named_parameters()} <= names.keys()
    assert all(name.startswith(("model.components.", "model.ci_fn.")) for name in names)
