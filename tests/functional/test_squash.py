"""Squashings and the backward that revives dead subcomponents (spec I1)."""

from __future__ import annotations

import naive
import pytest
import torch

from pdlightning import functional as pf
from pdlightning.modules.ci import SQUASHINGS

ORACLE = {
    pf.lower_leaky_hard_sigmoid: "lower_leaky_hard",
    pf.upper_leaky_hard_sigmoid: "upper_leaky_hard",
    pf.leaky_hard_sigmoid: "leaky_hard",
    pf.hard_sigmoid: "hard",
    pf.swish_hard_sigmoid: "swish_hard",
}


def gradient(function: object, x: float, g: float) -> float:
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(function(leaf), leaf, torch.tensor(g, dtype=torch.float64))  # type: ignore[operator]
    return found.item()


@pytest.mark.parametrize(
    ("x", "g", "passed"),
    [
        (-2.0, -3.0, -0.03),  # below zero only a push upward leaks through
        (-2.0, 3.0, 0.0),
        (0.0, -3.0, -0.03),  # zero belongs to the leak
        (0.0, 3.0, 0.0),
        (0.5, -3.0, -3.0),
        (0.5, 3.0, 3.0),
        (1.0, -3.0, -3.0),  # one still belongs to the inside
        (1.0, 3.0, 3.0),
        (1.5, -3.0, 0.0),
        (1.5, 3.0, 0.0),
    ],
)
def test_lower_squashing_passes_exactly_the_gradients_of_the_contract(x: float, g: float, passed: float) -> None:
    assert gradient(pf.lower_leaky_hard_sigmoid, x, g) == pytest.approx(passed, abs=1e-15)


def test_the_leak_is_alpha() -> None:
    assert gradient(lambda x: pf.lower_leaky_hard_sigmoid(x, alpha=0.5), -1.0, -2.0) == -1.0
    assert gradient(lambda x: pf.upper_leaky_hard_sigmoid(x, alpha=0.5), 3.0, 2.0) == 1.0
    assert float(pf.upper_leaky_hard_sigmoid(torch.tensor(3.0), alpha=0.5)) == 2.0


@pytest.mark.parametrize("function", list(ORACLE), ids=list(ORACLE.values()))
@pytest.mark.parametrize("g", [-1.0, 2.0])
def test_squashings_and_their_gradients_equal_the_oracle(function: object, g: float) -> None:
    x = torch.cat([torch.linspace(-3, 3, 25), torch.tensor([-1e-9, 1e-9, 1 - 1e-9, 1 + 1e-9])]).double()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = function(ours), naive.squash(ORACLE[function], theirs)  # type: ignore[operator, index]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for value in (y, expected):
        value.backward(torch.full_like(x, g))
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(SQUASHINGS))
def test_what_feeds_the_masks_stays_in_range_up_to_the_leak(name: str) -> None:
    x = torch.linspace(-20, 20, 401)
    lower, upper = (squash(x) for squash in SQUASHINGS[name])  # type: ignore[index]
    leak = 0.2 if name == "leaky" else 0.0
    assert -leak <= lower.min() and lower.max() <= 1 + leak
    assert bool((upper >= lower - 1e-6).all()), "the penalty never sees less than the mask"


def test_only_the_penalty_sees_how_far_a_logit_is_above_one() -> None:
    x = torch.tensor([1.0, 2.0, 11.0])
    assert pf.lower_leaky_hard_sigmoid(x).tolist() == [1.0, 1.0, 1.0]
    assert pf.upper_leaky_hard_sigmoid(x).tolist() == pytest.approx([1.0, 1.01, 1.1])
