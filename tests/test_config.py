from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from pdlightning.config import (
    ConfigError,
    config_hash,
    flatten,
    instantiate,
    suggest,
    to_plain,
    validate,
)
from pdlightning.launching.overrides import explain_override_error

HERE = (__name__.partition(".")[0],)


Kind = Literal["lp", "smooth_l0"]


class Penalty:
    def __init__(self, *, coeff: float, kind: Kind, hidden: list[int] | None = None, steps: int = 1):
        self.coeff, self.kind, self.hidden, self.steps = coeff, kind, hidden, steps


class Recipe:
    def __init__(self, *, loss: Mapping[str, Penalty], options: dict[str, float], name: str = None):  # type: ignore
        self.loss, self.options, self.name = loss, options, name


class Refuses:
    def __init__(self, *, size: int):
        raise ZeroDivisionError(f"size {size}")


def penalty(**changes: object) -> dict[str, object]:
    return {"_target_": f"{__name__}.Penalty", "coeff": 1e-3, "kind": "lp", **changes}


def recipe(**changes: object) -> dict[str, object]:
    return {"_target_": f"{__name__}.Recipe", "loss": {"importance": penalty(**changes)}, "options": {"p": 2}}


def refusal(config: Mapping[str, object], **kwargs: object) -> str:
    with pytest.raises(ConfigError) as error:
        validate(config, allow=HERE, **kwargs)  # type: ignore[arg-type]
    return str(error.value)


def test_nested_targets_are_built_and_containers_come_out_plain():
    built = instantiate(OmegaConf.create(recipe(hidden=[16, 8])), allow=HERE)
    assert isinstance(built.loss["importance"], Penalty)
    assert type(built.loss) is dict and type(built.options) is dict and type(built.loss["importance"].hidden) is list
    assert built.options == {"p": 2} and built.loss["importance"].hidden == [16, 8]


def test_a_node_without_target_is_a_plain_dict_of_built_values():
    linear = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}
    built = instantiate({"a": linear, "b": [1, {"c": None}]})
    assert isinstance(built["a"], nn.Linear) and built["b"] == [1, {"c": None}]


def test_partial_is_a_functools_partial_that_still_takes_the_rest():
    built = instantiate({"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.5, "betas": [0.5, 0.9]})
    assert isinstance(built, functools.partial)
    assert built([nn.Parameter(torch.zeros(1))]).defaults["lr"] == 0.5


def test_objects_inside_a_config_are_passed_on_as_they_are():
    module = nn.Linear(1, 1)
    assert instantiate({"modules": {"one": module}})["modules"]["one"] is module


def test_interpolations_are_resolved_also_from_outside_the_subtree():
    config = OmegaConf.create({"steps": 7, "loss": penalty(steps="${steps}")})
    assert instantiate(config.loss, allow=HERE, path="loss").steps == 7


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"coef": 1}, ["loss.importance.coef:", "Penalty", "did you mean 'coeff'?", "it takes: coeff, kind, hidden"]),
        ({"kind": "smooth_10"}, ["loss.importance.kind:", "'lp', 'smooth_l0'", "got 'smooth_10'", "mean 'smooth_l0'?"]),
        ({"kind": 3}, ["loss.importance.kind:", "'lp', 'smooth_l0'", "got 3"]),
        ({"steps": "abc"}, ["loss.importance.steps: expected int, got 'abc'"]),
        ({"steps": 1.5}, ["loss.importance.steps: expected int, got 1.5"]),
        ({"steps": True}, ["loss.importance.steps: expected int, got True"]),
        ({"coeff": "1e-3"}, ["loss.importance.coeff: expected float, got '1e-3'"]),
        ({"coeff": {"start": 1}}, ["loss.importance.coeff: expected float, got {'start': 1}"]),
        ({"hidden": 16}, ["loss.importance.hidden: expected list[int] | None, got 16"]),
        ({"hidden": [16, "x"]}, ["loss.importance.hidden: expected list[int] | None, got [16, 'x']"]),
        ({"coeff": "???"}, ["loss.importance.coeff: a value is required", "loss.importance.coeff=..."]),
        ({"_convert_": "all"}, ["loss.importance._convert_: unknown keyword", "_target_ and _partial_"]),
        ({"_partial_": "yes"}, ["loss.importance._partial_: expected true or false, got 'yes'"]),
    ],
)
def test_a_wrong_argument_is_refused_with_its_path_and_the_remedy(changes: dict[str, object], expected: list[str]):
    message = refusal(recipe(**changes))
    for words in expected:
        assert words in message


def test_every_problem_of_a_tree_is_listed_at_once():
    message = refusal({"a": penalty(coef=1), "b": [penalty(kind="q")], "c": "???"})
    assert [line.partition(":")[0] for line in message.splitlines()] == ["a.coef", "b[0].kind", "c"]


def test_a_missing_required_argument_is_named():
    message = refusal({"_target_": f"{__name__}.Penalty", "kind": "lp"}, path="loss.importance")
    assert message.startswith("loss.importance.coeff:") and "requires the argument 'coeff'" in message


def test_a_partial_node_may_lack_arguments_but_not_misspell_them():
    validate({"_target_": f"{__name__}.Penalty", "_partial_": True}, allow=HERE)
    assert "did you mean 'coeff'" in refusal({"_target_": f"{__name__}.Penalty", "_partial_": True, "coef": 1})


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("torch.nn.Linaer", "'torch.nn' has no 'Linaer'; did you mean 'Linear'?"),
        ("torch.opitm.AdamW", "'torch' has no 'opitm'; did you mean 'optim'?"),
        ("pdlightning.confg.suggest", "'pdlightning' has no 'confg'; did you mean 'config'?"),
        ("troch.nn.Linear", "outside the allowed packages; did you mean 'torch'?"),
        ("os.system", "outside the allowed packages (allowed: pdlightning, torch"),
        ("torch.os.system", "belongs to 'posix', outside the allowed packages"),
        ("pdlightning.config.importlib.import_module", "belongs to 'importlib'"),
        ("torch.nn", "is a module; expected a class or a function"),
        ("torch..nn", "expected a dotted path such as 'torch.nn.Linear', got 'torch..nn'"),
        (None, "expected a dotted path such as 'torch.nn.Linear', got None"),
    ],
)
def test_a_target_that_cannot_be_used_is_refused_before_it_is_called(target: object, expected: str):
    message = refusal({"loss": {"faithfulness": {"_target_": target}}})
    assert message.startswith("loss.faithfulness._target_: ") and expected in message


def test_allow_opens_a_package_of_the_users_own():
    with pytest.raises(ConfigError, match="outside the allowed packages"):
        validate(penalty())
    validate(penalty(), allow=HERE)


def test_a_module_that_fails_to_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "brokenpackage.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="importing 'brokenpackage' failed: No module named 'a_package_that"):
        validate({"_target_": "brokenpackage.X"}, allow=["brokenpackage"])


def test_an_unresolvable_interpolation_names_its_key():
    with pytest.raises(ConfigError, match=r"^a\.b: .*nowhere"):
        validate({"a": {"b": "${nowhere}"}})


def test_the_exception_of_a_constructor_passes_with_the_path_as_a_note():
    with pytest.raises(ZeroDivisionError) as error:
        instantiate({"x": {"_target_": f"{__name__}.Refuses", "size": 3}}, allow=HERE)
    assert error.value.__notes__ == [f"while building the config's x ({__name__}.Refuses)"]


def test_a_default_is_accepted_even_where_the_annotation_forbids_it():
    validate(recipe() | {"name": None}, allow=HERE)
    assert "name: expected str, got 3" in refusal(recipe() | {"name": 3})


def test_library_constructors_accept_their_documented_arguments():
    validate(
        {
            "trainer": {"_target_": "lightning.Trainer", "max_steps": 3, "precision": "bf16-mixed"},
            "checkpoint": {
                "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
                "dirpath": "x",
                "every_n_train_steps": 2,
                "save_top_k": -1,
            },
            "logger": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "x", "version": ""},
            "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3, "betas": [0.9, 0.99]},
        }
    )


def test_a_typo_in_the_trainer_is_found():
    message = refusal({"trainer": {"_target_": "lightning.Trainer", "max_step": 3}})
    assert "trainer.max_step:" in message and "did you mean 'max_steps'?" in message


def test_arguments_that_a_class_hands_to_its_base_are_checked_too():
    loss = {"_target_": "pdlightning.metrics.SmoothL0Loss", "gamma": 0.1, "coeff": 1.0, "beta": 0.5}
    validate(loss)
    for changes, said in (
        ({"p": 2.0}, "p: pdlightning.metrics.SmoothL0Loss has no argument 'p' (it takes: "),
        ({"betta": 0.5}, "did you mean 'beta'?"),
        ({"dist_sync_on_step": True}, "has no argument 'dist_sync_on_step'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            validate({**loss, **changes})
    merged = {"_target_": "pdlightning.metrics.MergedReconstructionLoss", "_partial_": True}
    validate(merged)  # it gives its base the source and routing that this requires


def test_suggest_ignores_case_and_stays_silent_without_a_near_name():
    assert suggest("sharedmlp", ["SharedMLP", "VectorMLP"]) == "; did you mean 'SharedMLP'?"
    assert suggest("zzz", ["SharedMLP"]) == ""


def test_flatten_gives_dotted_scalars_and_one_value_for_a_list():
    config = OmegaConf.create({"a": 1, "b": {"c": "${a}", "d": None}, "e": [1, {"f": 2}]})
    assert flatten(config) == {"a": 1, "b.c": 1, "b.d": None, "e": '[1, {"f": 2}]'}


def test_the_hash_depends_on_values_and_not_on_order_or_on_interpolation():
    reference = config_hash({"a": 1, "b": {"c": 2, "d": 1}})
    assert config_hash(OmegaConf.create({"b": {"d": "${a}", "c": 2}, "a": 1})) == reference
    assert config_hash({"a": 1, "b": {"c": 2, "d": 1.5}}) != reference
    assert len(reference) == 12


def test_to_plain_leaves_no_trace_of_omegaconf():
    plain = to_plain(OmegaConf.create({"a": {"b": [1, {"c": "${a.d}"}], "d": 4}}))
    assert plain == {"a": {"b": [1, {"c": 4}], "d": 4}}
    assert type(plain["a"]) is dict and type(plain["a"]["b"]) is list


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    for group, options in {"experiment": ["tms_5-2", "tms_40-10"], "target": ["tms", "resid_mlp"]}.items():
        (tmp_path / group).mkdir()
        for option in options:
            text = "# @package _global_\nextra: 1\n" if group == "experiment" else "x: 1\n"
            (tmp_path / group / f"{option}.yaml").write_text(text)
    (tmp_path / "config.yaml").write_text(
        "defaults: [_self_, {target: tms}, {experiment: tms_5-2}]\nseed: 0\nloss: {importance_minimality: {coeff: 1}}\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["experiment=tms_52"], ["experiment=tms_52:", "did you mean 'tms_5-2'?", "available: tms_40-10, tms_5-2"]),
        (["-m", "experiment=tms_40-10,tms_4010"], ["experiment=tms_4010:", "did you mean 'tms_40-10'?"]),
        (["experiment=tms_40-10", "--cfg", "job"], None),
        (["target=resid_mlp,tsm"], ["target=tsm:", "did you mean 'tms'?"]),
        (["target=resid_mlp", "seeed=3"], ["seeed:", "no 'seeed' at the top level; did you mean 'seed'?"]),
        (["target=[tms,tsm]"], ["target=tsm:", "did you mean 'tms'?"]),
        (["targett=tms"], ["targett:", "did you mean 'target'?"]),
        (["loss.importance_minimality.coef=1"], ["no 'coef' in 'loss.importance_minimality'; did you mean 'coeff'?"]),
        (["~loss.importance"], ["no 'importance' in 'loss'; did you mean 'importance_minimality'?"]),
        (["seed.x=1"], ["seed.x: 'seed' is a value (0), not a group of settings"]),
        (["extra=2", "seed=1,2"], None),
        (["+new=1", "hydra.job.name=x"], None),
        (["=broken"], None),
    ],
)
def test_a_refused_command_line_is_explained_where_more_can_be_said(
    config_dir: Path, words: list[str], expected: list[str] | None
):
    message = explain_override_error(words, config_dir)
    if expected is None:
        assert message is None
    else:
        assert message is not None
        for part in expected:
            assert part in message


def test_importing_the_module_imports_neither_hydra_nor_torch():
    code = "import sys, pdlightning.config; print([m for m in ('hydra', 'omegaconf', 'torch') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
