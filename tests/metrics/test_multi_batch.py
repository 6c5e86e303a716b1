"""The adversary against several batches climbs the gradient of all of them together (spec L7)."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from parity import COMPARISONS, SEED, assert_same, batch_of, built, observed, oracle_of
from torch import Tensor

from pdlightning.metrics import MultiBatchPGD
from pdlightning.modules import ComponentModel

SIZES = (3, 2, 4)


def metric_of(model: ComponentModel, **arguments: Any) -> MultiBatchPGD:
    settings = {"n_batches": 3, "n_steps": 4, "step_size": 0.2, "comparison": COMPARISONS["kl"]} | arguments
    metric = MultiBatchPGD(**settings)
    metric.term = "term"
    metric.prepare(model)
    return metric


def batches_of(data: str) -> list[Tensor]:
    return [batch_of(data, (size, 2), seed=size) for size in SIZES]


def measured(metric: MultiBatchPGD, model: ComponentModel, batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        for i, batch in enumerate(batches):
            metric.update(observed(model, batch, step=-1 - i))
        return metric.compute()[""]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("comparison", ["mse", "kl", "hidden"])
@pytest.mark.parametrize("data", ["vectors", "tokens"])
def test_it_is_the_oracles_climb_on_the_sum_of_the_batches(data: str, comparison: str) -> None:
    model, batches = built(data), batches_of(data)
    target, ci_fn = oracle_of(model)
    sites, lowers = target["sites"], []
    for batch in batches:
        logits = naive.ci_logits(ci_fn, sites, naive.clean_forward(target, batch)["inputs"])
        lowers.append({s: x.detach() for s, x in naive.causal_importances(logits)[0].items()})

    def objective(sources: naive.PerSite, deltas: naive.PerSite) -> naive.Pair:
        seen = zip(batches, lowers, strict=True)
        return naive.add_pairs(naive.reconstruction(target, b, ci, sources, deltas, None, comparison) for b, ci in seen)

    minus_one = naive.WORD  # the step of the first evaluation batch, as an unsigned word
    draws = naive.Draws(SEED, minus_one, tuple(range(SIZES[0])), (2,))
    start = naive.pgd_init(draws, sites, "term", init="random", scope="shared")
    expected = naive.value(objective(*naive.pgd(objective, *start, n_steps=4, step_size=0.2)))
    assert expected > 1.05 * naive.value(objective(*start))
    assert_same(measured(metric_of(model, comparison=COMPARISONS[comparison]), model, batches), expected)


def test_only_the_first_batches_count_and_a_reset_forgets_them() -> None:
    model, batches = built().float(), [b.float() for b in batches_of("vectors")]
    metric = metric_of(model, n_batches=2)
    first = measured(metric, model, batches)
    assert len(metric.kept) == 2 and all(inputs.device.type == "cpu" for inputs, *_ in metric.kept)
    assert torch.equal(first, measured(metric_of(model), model, batches[:2]))
    metric.reset()
    assert torch.equal(first, measured(metric, model, batches))
    assert all(p.grad is None for p in model.parameters())


def test_no_batch_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="n_batches must be >= 1, got 0"):
        metric_of(built(), n_batches=0)
