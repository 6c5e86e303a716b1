"""Every YAML of conf composes and can be bound; every experiment runs; no key of a config is without effect."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run.conftest import rows_of, summary_of
from run.test_language_experiments import language_experiments

import pdlightning
from pdlightning.__main__ import CONF
from pdlightning.build import validate_config
from pdlightning.run import run
from pdlightning.schema import BUILT, Logging, Run, Runtime

Composed = Callable[..., dict[str, Any]]
PENALTIES = ("importance_minimality", "smooth_l0")
SMALL = ("debug=fast", "data.batch_size=4", "target.data.batch_size=4", "runtime.keep_memory=false")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("experiment", sorted({*options("experiment")} - {*language_experiments()}))
def test_every_experiment_runs(composed: Composed, tmp_path: Path, experiment: str):
    config = composed(f"experiment={experiment}", *SMALL)
    config["pd"]["sites"] = dict.fromkeys(config["pd"]["sites"], 50)
    figures = [name for name, node in config["metric"]["slow"].items() if ".figures." in node["_target_"]]
    run(config, tmp_path / "run")
    summary = summary_of(tmp_path / "run")
    assert summary["experiment"] == experiment
    assert config["goal"].keys() <= summary["metrics"].keys() and config["objective"] in summary["metrics"]
    drawn = " ".join(path.name for path in (tmp_path / "run" / "figures").glob("*.png"))
    assert figures and all(name in drawn for name in figures)
    assert rows_of(tmp_path / "run").keys() == {0, 2, 3, 4, 6}


def chosen_loss(option: str) -> str:
    """The words that add a loss; those of attention patterns must be told what no target says."""
    settings = ("n_heads=1", "rope_base=null") if "attn_patterns" in option else ()
    told = (f"loss.{option}.comparison.{setting}" for setting in settings)
    return " ".join([f"loss=[importance_minimality,{option}]", *told])


@pytest.mark.parametrize(
    "words",
    [
        *(f"ci_fn={option}" for option in options("ci_fn")),
        *(chosen_loss(option) for option in options("loss") if option not in PENALTIES),
        *(f"logging={option}" for option in options("logging")),
        *(f"runtime={option} runtime.devices=2" for option in options("runtime")),
        *(f"precision='{option}'" for option in options("precision")),
        *(f"sweep={option}" for option in options("sweep")),
        *(f"debug={option}" for option in options("debug")),
    ],
)
def test_every_option_composes_and_binds(composed: Composed, words: str):
    # An experiment that has no settings of its own for a loss that `words` may leave out.
    validate_config(composed("experiment=tms_5-2-published", *words.split()))


def test_smooth_l0_takes_the_place_of_the_penalty(composed: Composed):
    words = ("loss=[faithfulness,smooth_l0]", "~loss.importance_minimality.p", "loss.importance_minimality.coeff=1e-3")
    validate_config(composed("experiment=tms_5-2-published", *words))


@pytest.mark.parametrize("group", ["target", "data", "metric"])
def test_every_target_data_and_metric_is_part_of_an_experiment(group: str):
    """Their runs are the test of them: what no experiment uses is tested by nobody."""
    text = " ".join(path.read_text() for path in CONF.rglob("*.yaml"))
    words = set(re.findall(r"[\w.-]+", text))
    assert set(options(group)) - words <= {"none"}


def test_every_setting_is_read_somewhere():
    """A key with a `_target_` is an argument of a constructor; the others are looked up by name."""
    read = set()
    for path in Path(pdlightning.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                read.add(node.slice.value)
    settings = {field.name for schema in (Logging, Run, Runtime) for field in dataclasses.fields(schema)}
    # These are referred to inside the YAML: pd.seed, pd.compile, pd.losses, pd.ci_fn and every comparison.
    assert settings | set(BUILT) == (settings | set(BUILT)) & read | {
        "seed",
        "compile",
        "checkpoint_activations",
        "loss",
        "ci_fn",
        "comparison",
    }
