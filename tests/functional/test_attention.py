"""Attention scores and the KL of two patterns (spec R3 `attention`)."""

from __future__ import annotations

import cmath
from typing import Any

import naive
import pytest
import torch
from functional.test_kl import Largest, normal
from torch import Tensor

from pdlightning.functional import kl
from pdlightning.functional.attention import attention_scores, pattern_kl_pair, rotate, split_heads

Projections = tuple[Tensor, Tensor]


@pytest.fixture(params=[1, 40, 2**18])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(kl, "CPU_CHUNK", request.param)
    return request.param


def projections(*batch: int, heads: int, kv_heads: int, seed: int = 0) -> Projections:
    """Outputs of a query and a key site at 5 positions, 4 numbers a head."""
    return normal(*batch, 5, 4 * heads, seed=seed), normal(*batch, 5, 4 * kv_heads, seed=seed + 1)


def by_head(outputs: Projections, heads: int, kv_heads: int, base: float | None) -> Projections:
    q, k = split_heads(outputs[0], heads), split_heads(outputs[1], kv_heads)
    return (q, k) if base is None else (rotate(q, base=base), rotate(k, base=base))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("batch", [(2,), (2, 2)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("base", [None, 100.0])
def test_value_and_gradient_equal_the_oracle(
    heads: int, kv_heads: int, batch: tuple[int, ...], causal: bool, base: float | None
) -> None:
    clean = projections(*batch, heads=heads, kv_heads=kv_heads)
    leaves = [x.requires_grad_() for x in projections(*batch, heads=heads, kv_heads=kv_heads, seed=2)]
    masked = (leaves[0], leaves[1])
    settings: dict[str, Any] = {"n_heads": heads, "n_kv_heads": kv_heads, "rope_base": base}
    expected, expected_count = naive.attention_kl(clean, masked, {**settings, "causal": causal, "scale": 0.7})
    heads_of = [by_head(outputs, heads, kv_heads, base) for outputs in (clean, masked)]
    total, count = pattern_kl_pair(heads_of[0], heads_of[1], scale=0.7, causal=causal)
    assert count == expected_count
    tolerance = 1e-12 if base is None else 1e-6  # the angles of RoPE are float32, as in the models
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(*(torch.autograd.grad(x, leaves) for x in (total, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck_with_fewer_heads_of_keys(chunk: int, causal: bool) -> None:
    clean = (normal(2, 4, 3, 2), normal(2, 2, 3, 2, seed=1))
    masked = tuple(x.requires_grad_() for x in (normal(2, 4, 3, 2, seed=2), normal(2, 2, 3, 2, seed=3)))
    assert torch.autograd.gradcheck(lambda q, k: pattern_kl_pair(clean, (q, k), scale=0.5, causal=causal)[0], masked)


def test_equal_patterns_have_no_divergence_and_the_clean_one_no_gradient() -> None:
    q, k = (x.requires_grad_() for x in (normal(1, 2, 6, 4), normal(1, 2, 6, 4, seed=1)))
    total, count = pattern_kl_pair((q, k), (q, k), scale=0.5, causal=True)
    assert (total.item(), count) == (0, 12)
    other = normal(1, 2, 6, 4, seed=2).requires_grad_()
    total, _ = pattern_kl_pair((q, k), (other, k.detach()), scale=0.5, causal=True)
    total.backward()
    assert q.grad is None and k.grad is None and other.grad is not None


def test_a_later_key_has_no_probability_and_no_gradient() -> None:
    pattern = attention_scores(normal(6, 4), normal(6, 4, seed=1), scale=1.0, causal=True).softmax(-1)
    assert not pattern.triu(1).any()
    torch.testing.assert_close(pattern.sum(-1), torch.ones(6, dtype=torch.float64))
    q, k = normal(1, 1, 3, 4, seed=1), normal(1, 1, 3, 4).requires_grad_()
    clean, first_query = (normal(1, 1, 3, 4, seed=2), normal(1, 1, 3, 4, seed=3)), torch.tensor([1.0, 0, 0]).double()
    total, _ = pattern_kl_pair(clean, (q * first_query[:, None], k), scale=1.0, causal=True)
    total.backward()
    assert k.grad is not None and not k.grad.any(), "the first query sees one key, whatever it is"


def test_rope_turns_pairs_of_halves_by_the_position() -> None:
    x = normal(2, 7, 6)
    turned = rotate(x, base=50.0)
    for t in range(7):
        for i in range(3):
            z = complex(x[1, t, i], x[1, t, i + 3]) * cmath.exp(1j * t * 50.0 ** (-2 * i / 6))
            assert complex(turned[1, t, i], turned[1, t, i + 3]) == pytest.approx(z, abs=1e-6)


def test_no_scores_of_all_heads_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl, "CPU_CHUNK", 2 * 20 * 20)
    clean = (normal(3, 4, 20, 2), normal(3, 4, 20, 2, seed=1))
    masked = (normal(3, 4, 20, 2, seed=2).requires_grad_(), normal(3, 4, 20, 2, seed=3).requires_grad_())
    with Largest(size=3 * 20 * 20) as made:
        total, _ = pattern_kl_pair(clean, masked, scale=0.5, causal=True)
        total.backward()
    assert not made.made


def test_single_precision_whatever_autocast_says() -> None:
    x = [normal(1, 2, 6, 4, seed=seed).float() for seed in range(4)]
    clean, masked = (x[0], x[1]), (x[2], x[3])
    masked[0].requires_grad_()
    total, _ = pattern_kl_pair(clean, masked, scale=0.5, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = pattern_kl_pair(clean, masked, scale=0.5, causal=True)
        (gradient,) = torch.autograd.grad(value, masked[0])
    assert torch.equal(value, total) and torch.equal(gradient, torch.autograd.grad(total, masked[0])[0])
    short = [(q.bfloat16(), k.bfloat16()) for q, k in (clean, masked)]
    assert pattern_kl_pair(short[0], short[1], scale=0.5, causal=True)[0].dtype == torch.float32


def test_a_compiler_takes_it_in_one_graph() -> None:
    clean = projections(2, heads=4, kv_heads=2)
    leaves = [x.requires_grad_() for x in projections(2, heads=4, kv_heads=2, seed=2)]

    def loss(q: Tensor, k: Tensor) -> Tensor:
        heads = by_head((q, k), 4, 2, 100.0)
        return pattern_kl_pair(by_head(clean, 4, 2, 100.0), heads, scale=0.5, causal=True)[0]

    eager, compiled = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(*(torch.autograd.grad(x, leaves) for x in (compiled, eager)), strict=True):
        torch.testing.assert_close(ours, theirs)
