"""Faithfulness, importance minimality and the total against the oracle, and what every loss shares (spec 5)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
from parity import (
    STEP,
    assert_same,
    assert_same_value_and_gradients,
    batch_of,
    built,
    observed,
    oracle_config,
    oracle_of,
)
from torch import nn

from pdlightning.metrics import FaithfulnessLoss, ImportanceMinimalityLoss, Loss, SmoothL0Loss
from pdlightning.modules import ComponentModel
from pdlightning.schedules import Anneal, Schedule

pytestmark = pytest.mark.usefixtures("float64")
STEPS = 20


def check(loss: Loss, term: naive.Config, data: str, leading: tuple[int, ...]) -> None:
    model, batch = built(data, squash="leaky_hard"), batch_of(data, leading)
    target, ci_fn = oracle_of(model)
    loss.prepare(model)
    loss.set_progress(STEP, STEPS)
    config = oracle_config({"term": {"coeff": 1.0, **term}})
    values, _ = naive.step_losses(target, ci_fn, batch, range(leading[0]), STEP, config)
    total, count = loss.measure(observed(model, batch))
    assert_same_value_and_gradients(model, total / count, values["term"], target, ci_fn)


@pytest.mark.parametrize("form", ["mean_squared", "relative"])
@pytest.mark.parametrize("data", ["vectors", "tokens"])
def test_faithfulness(form: Any, data: str) -> None:
    check(FaithfulnessLoss(coeff=1.0, form=form), {"kind": "faithfulness", "form": form}, data, (2,))


@pytest.mark.parametrize(("data", "leading"), [("vectors", (5,)), ("vectors", (2, 3)), ("tokens", (2, 2))])
@pytest.mark.parametrize("annealed", [False, True])
@pytest.mark.parametrize(("beta", "reference"), [(0.0, None), (0.5, None), (0.5, 1000)])
@pytest.mark.parametrize("phi", ["lp", "smooth_l0"])
def test_importance_minimality(
    data: str, leading: tuple[int, ...], annealed: bool, beta: float, reference: int | None, phi: str
) -> None:
    term: naive.Config = {"kind": "importance_minimality", "phi": phi, "beta": beta, "reference_count": reference}
    shared: dict[str, Any] = {"coeff": 1.0, "beta": beta, "reference_count": reference}
    fracs = {"start_frac": 0.1, "end_frac": 0.9}
    if phi == "lp":
        term["p"] = {"p_start": 2.0, "p_end": 0.5, **fracs} if annealed else 1.5
        p = Anneal(start=2.0, end=0.5, **fracs) if annealed else 1.5
        check(ImportanceMinimalityLoss(p=p, **shared), term, data, leading)
    else:
        schedule = {"start": 1.0, "kind": "cosine", "warmup_frac": 0.1, "final_frac": 0.1}
        term |= {"gamma": schedule if annealed else 0.3, "scaled": annealed}
        gamma = Schedule(**schedule) if annealed else 0.3  # type: ignore[arg-type]
        check(SmoothL0Loss(gamma=gamma, normalised=annealed, **shared), term, data, leading)


def importance(model: ComponentModel, **arguments: Any) -> ImportanceMinimalityLoss:
    loss = ImportanceMinimalityLoss(coeff=1.0, p=1.0, **arguments)
    loss.prepare(model)
    return loss


def test_the_smooth_frequency_is_a_bias_corrected_moving_average() -> None:
    model = built()
    loss, halflife = importance(model, beta=0.5, ema_halflife=2.0), 2.0
    frequencies: dict[str, list[torch.Tensor]] = {}
    for t in range(4):
        observation = observed(model, batch_of("vectors", (4,), seed=t))
        expected = torch.zeros(())
        for site, upper in observation.ci.upper.items():
            f = (upper + 1e-12).mean(0)
            frequencies.setdefault(site, []).append(f)
            weights = torch.tensor([0.5 ** ((t - i) / halflife) for i in range(t + 1)])
            smooth = (weights[:, None] * torch.stack(frequencies[site])).sum(0) / weights.sum()
            expected = expected + (f + 0.5 * f * torch.log2(1 + 4 * smooth)).sum()
        total, count = loss.measure(observation)
        assert_same(total / count, expected)


def test_the_gradient_passes_through_the_newest_part_of_the_average_only() -> None:
    model = built()
    loss, plain = importance(model, beta=0.5, ema_halflife=1.0), importance(model, beta=0.5)
    first = observed(model, batch_of("vectors", (4,)))
    total, count = loss.measure(first)
    expected, _ = plain.measure(first)
    assert_same(total, expected)
    parameters = list(model.ci_fn.parameters())
    found, wanted = (torch.autograd.grad(value, parameters, retain_graph=True) for value in (total, expected))
    for g, h in zip(found, wanted, strict=True):
        assert_same(g, h)


def test_evaluation_does_not_move_the_average() -> None:
    model = built()
    loss = importance(model, beta=0.5, ema_halflife=2.0)
    observation = observed(model, batch_of("vectors", (4,)))
    loss.measure(observation)
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    observation.training = False
    loss.measure(observation)
    assert before and all(torch.equal(before[name], buffer) for name, buffer in loss.named_buffers())


def test_unequal_parts_of_a_batch_give_the_importance_of_the_whole() -> None:
    """Without the frequency term, which is not linear in the batch."""
    model, batch = built(), batch_of("vectors", (8, 2))
    smooth, faithful = lambda: SmoothL0Loss(coeff=1.0, gamma=0.3), lambda: FaithfulnessLoss(coeff=1.0)
    for make in (lambda: importance(model), smooth, faithful):
        whole, parts = make(), make()
        whole.update(observed(model, batch))
        parts.update(observed(model, batch[:3]))
        parts.update(observed(model, batch[3:], first=3))
        assert_same(parts.compute(), whole.compute())


def test_no_division_by_the_number_of_sites() -> None:
    model, batch = built(), batch_of("vectors", (6,))
    upper = observed(model, batch).ci.upper
    loss = importance(model)
    loss.update(observed(model, batch))
    assert_same(loss.compute(), sum(u.mean(0).sum() for u in upper.values()) + 0.0 * upper["first"].sum())


def test_a_loss_is_measured_once_per_update_and_resets() -> None:
    calls = []

    class Counting(FaithfulnessLoss):
        def measure(self, observation: Any) -> Any:
            calls.append(1)
            return super().measure(observation)

    model = built()
    loss, observation = Counting(coeff=1.0), observed(model, batch_of("vectors", (2,)))
    value = loss(observation)
    assert len(calls) == 1, "an adversary would attack twice"
    assert_same(value, loss.compute())
    loss.reset()
    assert (loss.sum.item(), loss.count.item()) == (0, 0)
    copy.deepcopy(loss)


def test_scheduled_coefficients_weigh_the_total_as_in_the_oracle() -> None:
    schedule = {"start": 2.0, "kind": "linear", "warmup_frac": 0.5, "final_frac": 0.0}
    loss = FaithfulnessLoss(coeff=Schedule(**schedule))  # type: ignore[arg-type]
    assert loss.trained
    for step in range(STEPS):
        loss.set_progress(step, STEPS)
        assert float(loss.coeff.now) == pytest.approx(naive.number_at(schedule, step, STEPS), abs=1e-15)
    assert not FaithfulnessLoss(coeff=0).trained


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FaithfulnessLoss(coeff=-1.0), r"FaithfulnessLoss\(coeff\).*>= 0 or a schedule, got -1.0"),
        (lambda: FaithfulnessLoss(coeff=math.nan), "got nan"),
        (lambda: FaithfulnessLoss(coeff=1.0, form="mean"), "mean_squared or relative, got 'mean'"),  # type: ignore[arg-type]
        (lambda: ImportanceMinimalityLoss(coeff=1.0, p=1.0, beta=-0.5), "beta must be >= 0"),
        (lambda: ImportanceMinimalityLoss(coeff=1.0, p=1.0, reference_count=0), "reference_count >= 1"),
        (lambda: SmoothL0Loss(coeff=1.0, gamma=0.1, ema_halflife=0.0), "ema_halflife.*above 0, got 0.0"),
    ],
)
def test_impossible_losses_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16()], ids=["to", "bfloat16"])
def test_states_and_schedules_keep_their_precision(convert: Callable[[nn.Module], nn.Module]) -> None:
    """As in a module of precision bf16-true."""
    torch.set_default_dtype(torch.float32)
    loss = FaithfulnessLoss(coeff=Schedule(start=1.003, kind="constant"))
    convert(nn.ModuleDict({"faithfulness": loss}))
    loss.set_progress(0, 2)
    loss.update((torch.tensor(1.003), 1))
    assert loss.compute().item() == pytest.approx(1.003, abs=1e-6)
    assert float(loss.coeff.now) == pytest.approx(1.003, abs=1e-6)
    loss.reset()
    assert loss.sum.dtype == torch.float32
