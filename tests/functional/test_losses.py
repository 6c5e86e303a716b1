"""The formulas of the losses against the oracle, torch's own, and numbers by hand (spec R3, L2, L3)."""

from __future__ import annotations

import math

import naive
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pdlightning import functional as pf


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_kl_divides_by_positions_and_squared_error_by_elements() -> None:
    clean, masked = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    total, count = pf.kl_pair(clean, masked)
    assert count == 2 * 3
    log_q, log_p = masked.log_softmax(-1), clean.log_softmax(-1)
    same(total, F.kl_div(log_q, log_p, log_target=True, reduction="sum"))
    same(pf.kl_divergence(clean, masked), naive.value(naive.kl(clean, masked)))
    total, count = pf.squared_error(clean, masked)
    assert count == 2 * 3 * 5
    same(total / count, F.mse_loss(masked, clean))


def test_kl_of_a_known_pair_of_distributions() -> None:
    clean, masked = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert pf.kl_divergence(clean[None], masked[None]).item() == pytest.approx(expected, rel=1e-6)


def test_kl_ignores_the_offset_of_the_logits_and_survives_large_ones() -> None:
    clean, masked = 1e4 * normal(4, 5), 1e4 * normal(4, 5, seed=1)
    value = pf.kl_divergence(clean, masked)
    assert value.isfinite() and value > 0
    same(pf.kl_divergence(clean + 7, masked - 3), value)
    assert pf.kl_divergence(clean, clean).item() == 0


def test_gradient_of_kl_is_the_difference_of_probabilities() -> None:
    clean, masked = normal(2, 3, 5), normal(2, 3, 5, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(pf.kl_divergence(clean, masked), masked)
    same(gradient, (masked.softmax(-1) - clean.softmax(-1)).detach() / 6)


def test_both_forms_of_faithfulness_equal_the_oracle() -> None:
    sites = {
        name: naive.make_site("linear", normal(d_out, d_in), None, normal(d_in, 3, seed=1), normal(3, d_out, seed=2))
        for name, d_in, d_out in (("a", 2, 4), ("b", 5, 3))
    }
    deltas = {name: s["W"] - (s["V"] @ s["U"]).T for name, s in sites.items()}
    weights = {name: sites[name]["W"] for name in reversed(sites)}
    same(pf.faithfulness_loss(deltas), naive.value(naive.faithfulness(sites, "mean_squared")))
    same(pf.faithfulness_loss(list(deltas.values())), pf.faithfulness_loss(deltas))
    same(pf.relative_faithfulness_loss(deltas, weights), naive.value(naive.faithfulness(sites, "relative")))
    assert pf.relative_faithfulness_loss(weights, weights).item() == pytest.approx(1)


def test_faithfulness_is_taken_in_single_precision_when_weights_are_half() -> None:
    delta = torch.full((64, 64), 1e-4, dtype=torch.float16)  # its square is not a float16
    value = pf.faithfulness_loss(delta)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(1e-8, rel=1e-3)


@pytest.mark.parametrize("p", [0.4, 1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("leading", [(4,), (2, 3)])
def test_importance_minimality_equals_the_oracle(p: float, beta: float, leading: tuple[int, ...]) -> None:
    upper = {s: normal(*leading, C, seed=C).sigmoid().requires_grad_() for s, C in (("a", 3), ("b", 2))}
    ours = pf.importance_minimality_loss(upper, p, beta)
    theirs = naive.value(naive.importance_minimality(upper, lambda u: naive.lp(u, p=p), beta=beta))
    same(ours, theirs)
    leaves = list(upper.values())
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        same(a, b)


def test_importance_minimality_by_hand() -> None:
    # Two positions, two subcomponents: f = (1, 1/2), N = 2.
    upper = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    expected = 1.5 + 0.5 * (1 * math.log2(3) + 0.5 * math.log2(2))
    assert pf.importance_minimality_loss(upper, p=1.0, beta=0.5).item() == pytest.approx(expected, rel=1e-6)


def test_smooth_l0_equals_the_oracle_and_normalised_is_one_at_one() -> None:
    u = torch.linspace(-0.5, 1.5, 9).double()
    for normalised in (False, True):
        same(pf.smooth_l0_penalty(u, 0.3, normalised=normalised), naive.smooth_l0(u, gamma=0.3, scaled=normalised))
    assert float(pf.smooth_l0_penalty(torch.tensor(1.0), 0.7, normalised=True)) == pytest.approx(1)
    assert float(pf.smooth_l0_penalty(torch.tensor(0.3), 0.3)) == pytest.approx(0.5), "half at gamma"


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_component_forward_equals_its_definition(leading: tuple[int, ...]) -> None:
    x, V, U, W, b = normal(*leading, 5), normal(5, 4), normal(4, 3), normal(3, 5), normal(3)
    mask, delta = normal(*leading, 4).sigmoid(), normal(*leading, seed=1).sigmoid()
    same(pf.component_forward(x, V, U, mask, W, b), ((x @ V) * mask) @ U + b)
    expected = ((x @ V) * mask) @ U + delta[..., None] * (x @ (W - (V @ U).T).T) + b
    same(pf.component_forward(x, V, U, mask, W, b, delta), expected)
    same(pf.component_forward(x, V, U, torch.ones_like(mask), W, b, torch.ones_like(delta)), F.linear(x, W, b))
    same(pf.component_forward(x, V, U, None, W), (x @ V) @ U)


def test_a_mask_is_the_source_where_ci_is_zero_and_one_where_ci_is_one() -> None:
    source = torch.tensor([0.0, 0.3, 1.0])
    assert torch.equal(pf.interpolate_mask(torch.zeros(3), source), source)
    assert torch.equal(pf.interpolate_mask(torch.ones(3), source), torch.ones(3))
    assert pf.interpolate_mask(torch.full((3,), 0.5), source).tolist() == pytest.approx([0.5, 0.65, 1.0])
