"""CUDA graphs: asked for, they reach torch.compile; where they cannot be, a sentence says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adversaries import config_of, decomposition, quiet
from parity import batch_of

from pdlightning.compiling import check_graphs, compiled
from pdlightning.config import ConfigError
from pdlightning.schema import check_settings


@pytest.mark.parametrize(("asked", "mode"), [(True, None), ("graphs", "reduce-overhead")])
def test_torch_is_told_of_the_mode(monkeypatch: pytest.MonkeyPatch, asked: Any, mode: str | None) -> None:
    told = []

    def tell(function: Any, **settings: Any) -> Any:
        told.append(settings.get("mode"))
        return function

    monkeypatch.setattr(torch, "compile", tell)
    step = compiled(lambda x, y: x + y, asked)
    assert step is not None and step(1, 2) == 3 and told == [mode]


def test_every_step_as_graphs_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a counter that moves before each step keeps a backward inside it from ending it."""
    from torch._inductor.cudagraph_trees import MarkStepBox

    monkeypatch.setattr(MarkStepBox, "mark_step_counter", 0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    step = compiled(lambda: MarkStepBox.mark_step_counter, "graphs")
    assert step is not None and step() != step()


def test_eager_is_not_compiled_and_other_words_are_refused() -> None:
    assert compiled(lambda: 0, False) is None
    with pytest.raises(ValueError, match="expected False, True or 'graphs', got 'graph'"):
        compiled(lambda: 0, "graph")  # type: ignore[arg-type]


def test_without_a_gpu_a_training_as_graphs_is_refused() -> None:
    model = decomposition(config_of(["adam single"]), compile="graphs")
    with pytest.raises(ValueError, match="needs a CUDA device, one rank and no accumulation; got 'cpu'"):
        quiet(2).fit(model, [batch_of("vectors", (4,))])  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [{"ranks": 2, "micro_batches": 1}, {"ranks": 1, "micro_batches": 2}])
def test_several_ranks_or_parts_of_a_step_are_refused(case: dict[str, int]) -> None:
    check_graphs(torch.device("cuda"), ranks=1, micro_batches=1)
    with pytest.raises(ValueError, match="one rank and no accumulation"):
        check_graphs(torch.device("cuda"), **case)


RUNTIME = {
    "accelerator": "gpu", "devices": 1, "precision": "32-true", "compile": "graphs", "threads": None,
    "keep_memory": False, "target_dtype": None, "nodes": 1, "strategy": "auto", "accumulate": 1,
    "checkpoint_activations": False,
}  # fmt: skip


def problems(**runtime: Any) -> str:
    """What is wrong with a config that has nothing but this runtime."""
    groups = dict.fromkeys(("target", "data", "pd", "metric", "loss", "ci_fn", "comparison", "logging"), {})
    with pytest.raises(ConfigError) as found:
        check_settings({**groups, "runtime": {**RUNTIME, **runtime}})
    return str(found.value)


@pytest.mark.parametrize("wrong", [{"accelerator": "cpu"}, {"devices": 2}, {"nodes": 2}, {"accumulate": 4}])
def test_a_config_that_has_no_single_gpu_is_refused_with_graphs(wrong: dict[str, Any]) -> None:
    sentence = "compile=graphs replays the step of one GPU"
    assert sentence in problems(**wrong) and sentence not in problems()
    assert sentence not in problems(**wrong, compile=True)
    assert "runtime.compile: expected" in problems(compile="graph")
