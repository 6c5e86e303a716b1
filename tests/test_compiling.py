"""CUDA graphs: asked for, they reach torch.compile; where they cannot be, a sentence says so."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from adversaries import config_of, decomposition, quiet
from parity import batch_of
from rehearsal.test_sizes import language_model
from torch._functorch import config as functorch

from pdlightning.compiling import KEPT, check_graphs, compiled
from pdlightning.config import ConfigError
from pdlightning.functional import derivatives
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


@pytest.mark.parametrize("asked", [True, "graphs"])
@pytest.mark.parametrize("less", [False, True])
def test_a_compiler_is_told_to_keep_less_where_activations_are_computed_twice(
    asked: Any, less: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    step = compiled(lambda: functorch.activation_memory_budget, asked, keep_less=less)
    assert step is not None and step() == (KEPT if less else 1.0)
    assert functorch.activation_memory_budget == 1.0, "of other people's graphs they keep what they like"


@pytest.mark.usefixtures("float64")
def test_what_a_compiled_step_does_not_keep_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivatives, "LARGE", 1)
    original, kept, gradients = torch.compile, [], []
    monkeypatch.setattr(torch, "compile", partial(original, backend="aot_eager_decomp_partition"))
    for less in (False, True):
        torch.compiler.reset()
        pd, batch = language_model()
        pd.compiled_step = compiled(pd._compute_step, True, keep_less=less)
        pd.steps = 1
        pd.set_progress(0)
        held: dict[int, int] = {}

        def keep(x: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            total = pd.compute_step(batch, pd.step_now).total
        total.backward()
        own = {x.untyped_storage().data_ptr() for x in (*pd.parameters(), *pd.buffers(), *pd.target.parameters())}
        kept.append(sum(size for place, size in held.items() if place not in own))
        gradients.append([p.grad for p in pd.parameters() if p.grad is not None])
    assert kept[1] < 0.6 * kept[0], kept
    for whole, less in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, less, rtol=1e-10, atol=1e-12)


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
