"""Chunked KL and cross-entropy: exact, differentiable, and with nothing as large as the logits (spec R3, E2)."""

from __future__ import annotations

import math
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pdlightning import functional as pf
from pdlightning.functional import kl

SHAPES = [(7,), (1, 5), (4, 6), (2, 3, 5), (11, 130)]
CHUNKS = [1, 13, 40, 2**18]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=CHUNKS)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(kl, "CPU_CHUNK", request.param)
    return request.param


def plain(clean: Tensor, masked: Tensor) -> Tensor:
    log_p = clean.log_softmax(-1)
    return (log_p.exp() * (log_p - masked.log_softmax(-1))).sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_equal_the_oracle_for_every_chunk(shape: tuple[int, ...], chunk: int) -> None:
    clean, masked = normal(*shape), normal(*shape, seed=1).requires_grad_()
    total, count = pf.kl_pair(clean, masked)
    expected, expected_count = naive.kl(clean, masked)
    assert count == expected_count
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    (ours,), (theirs,) = (torch.autograd.grad(3 * value, masked) for value in (total, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 300])
def test_single_precision_is_exact_to_a_millionth(rows: int) -> None:
    clean, masked = normal(rows, 2000, dtype=torch.float32), normal(rows, 2000, seed=1, dtype=torch.float32)
    total, _ = pf.kl_pair(clean, masked.requires_grad_())
    expected = plain(clean.double(), masked.double())
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    (ours,), (exact,) = (torch.autograd.grad(value, masked) for value in (total, expected))
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-8)  # of differences of probabilities near 1e-3


def test_the_normaliser_of_the_clean_logits_may_be_given(chunk: int) -> None:
    clean, masked = normal(3, 4, 9), normal(3, 4, 9, seed=1).requires_grad_()
    given, _ = pf.kl_pair(clean, masked, kl.log_normalizer(clean))
    assert torch.equal(given, pf.kl_pair(clean, masked)[0])
    torch.testing.assert_close(kl.log_normalizer(clean).squeeze(-1), clean.logsumexp(-1))


def test_gradcheck(chunk: int) -> None:
    clean, masked = normal(2, 3, 5), normal(2, 3, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pf.kl_divergence(clean, x), masked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_summed_in_single_precision(dtype: torch.dtype) -> None:
    clean, masked = (normal(9, 500, seed=seed, dtype=dtype) for seed in (0, 1))
    longer = masked.float().requires_grad_()
    total, _ = pf.kl_pair(clean, masked.requires_grad_())
    expected, _ = pf.kl_pair(clean.float(), longer)
    assert total.dtype == torch.float32 and torch.equal(total, expected)
    (gradient,), (exact,) = torch.autograd.grad(total, masked), torch.autograd.grad(expected, longer)
    assert gradient.dtype == dtype and torch.equal(gradient, exact.to(dtype))


def test_autocast_changes_nothing() -> None:
    clean, masked = normal(4, 50, dtype=torch.float32), normal(4, 50, seed=1, dtype=torch.float32).requires_grad_()
    expected = pf.kl_divergence(clean, masked)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = pf.kl_divergence(clean, masked)
        (gradient,) = torch.autograd.grad(value, masked)
    assert torch.equal(value, expected) and torch.equal(gradient, torch.autograd.grad(expected, masked)[0])


def test_the_clean_logits_are_a_constant() -> None:
    clean, masked = normal(4, 5).requires_grad_(), normal(4, 5, seed=1).requires_grad_()
    pf.kl_divergence(clean, masked).backward()
    assert clean.grad is None and masked.grad is not None
    assert not pf.kl_divergence(clean, masked.detach()).requires_grad


def test_second_derivatives_are_refused() -> None:
    masked = normal(4, 5).requires_grad_()
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(pf.kl_divergence(normal(4, 5, seed=1), masked), masked, create_graph=True)


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_no_positions_are_no_loss(leading: tuple[int, ...]) -> None:
    masked = torch.zeros(*leading, 5).requires_grad_()
    total, count = pf.kl_pair(torch.zeros(*leading, 5), masked)
    assert (total.item(), count) == (0, 0)
    assert torch.autograd.grad(total, masked)[0].shape == masked.shape


def test_logits_may_lie_anyhow_in_memory(chunk: int) -> None:
    clean, masked = normal(3, 5, 4), normal(5, 3, 4, seed=1).requires_grad_()
    total, _ = pf.kl_pair(clean[:, 1:], masked.transpose(0, 1)[:, 1:])
    expected = plain(clean[:, 1:], masked.transpose(0, 1)[:, 1:])
    torch.testing.assert_close(total, expected)
    (ours,), (theirs,) = (torch.autograd.grad(value, masked) for value in (total, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("others", [(4, 6), (5,), (2, 5)])
def test_logits_of_two_shapes_are_refused(others: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one shape \[\*leading, vocab\], got \(4, 5\) and"):
        pf.kl_pair(torch.zeros(4, 5), torch.zeros(others))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made, and how many there are of at least `size`."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.made, self.kept = size, set[int](), list[Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given and x.numel() >= self.size:
                self.made.add(x.untyped_storage()._cdata)
                self.kept.append(x)  # so that no storage takes the name of an earlier one
        return out


def test_only_the_gradient_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl, "CPU_CHUNK", 4 * 30)
    clean, masked = normal(100, 30), normal(100, 30, seed=1).requires_grad_()
    with Largest(size=5 * 30) as forward:
        value = pf.kl_divergence(clean, masked)
    assert not forward.made
    with Largest(size=5 * 30) as backward:
        value.backward()
    assert len(backward.made) == 1
    with Largest(size=5 * 30) as unchunked:
        plain(clean, masked)
    assert len(unchunked.made) > 3, "the yardstick sees what the plain formula makes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiler_takes_it_in_one_graph(dtype: torch.dtype) -> None:
    clean, masked = normal(6, 40, dtype=dtype), normal(6, 40, seed=1, dtype=dtype).requires_grad_()

    def loss(clean: Tensor, masked: Tensor) -> Tensor:
        return pf.kl_divergence(clean, masked)

    eager, compiled = loss(clean, masked), torch.compile(loss, fullgraph=True, backend="aot_eager")(clean, masked)
    torch.testing.assert_close(compiled, eager)
    (ours,), (theirs,) = (torch.autograd.grad(value, masked) for value in (compiled, eager))
    torch.testing.assert_close(ours, theirs)


def test_cross_entropy_adds_up_the_labelled_positions(chunk: int) -> None:
    logits, labels = normal(3, 4, 6), torch.randint(6, (3, 4), generator=torch.Generator().manual_seed(0))
    labels[:, -1] = -100
    total, count = pf.cross_entropy_pair(logits, labels)
    expected = [-logits[i][j].log_softmax(0)[labels[i, j]] for i in range(3) for j in range(3)]
    assert count == 9
    torch.testing.assert_close(total, torch.stack(expected).sum())
    torch.testing.assert_close(total / count, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_cross_entropy_of_even_logits_is_the_logarithm_of_the_vocabulary() -> None:
    total, count = pf.cross_entropy_pair(torch.zeros(5, 8, dtype=torch.bfloat16), torch.arange(5))
    assert total.dtype == torch.float32 and float(total / count) == pytest.approx(math.log(8))
    total, count = pf.cross_entropy_pair(torch.zeros(5, 8), torch.full((5,), -100))
    assert (float(total), int(count)) == (0, 0)
