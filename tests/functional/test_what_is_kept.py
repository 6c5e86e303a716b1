"""Formulas whose backward computes again what would be large to keep: the same gradients from fewer tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pdlightning import functional as pf
from pdlightning.functional import derivatives


def uniform(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (0.1 + 0.8 * drawn).requires_grad_()


def interpolated(ci: Tensor, source: Tensor) -> Tensor:
    return ci + (1 - ci) * source


def product(a: Tensor, U: Tensor, mask: Tensor) -> Tensor:
    return pf.masked_product(a, U, mask=mask, delta_mask=None, x_weight=None, bias=None)


def product_and_delta(a: Tensor, U: Tensor, mask: Tensor, delta: Tensor, x_weight: Tensor) -> Tensor:
    return pf.masked_product(a, U, mask=mask, delta_mask=delta, x_weight=x_weight, bias=None)


def delta_alone(a: Tensor, U: Tensor, delta: Tensor, x_weight: Tensor) -> Tensor:
    return pf.masked_product(a, U, mask=None, delta_mask=delta, x_weight=x_weight, bias=None)


FORMULAS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "a source of its own": (pf.interpolate_mask, interpolated, [(3, 4, 5), (3, 4, 5)]),
    "a source that samples share": (pf.interpolate_mask, interpolated, [(3, 4, 5), (1, 4, 5)]),
    "one source": (pf.interpolate_mask, interpolated, [(3, 4, 5), (1, 1, 5)]),
    "penalty": (lambda u: pf.lp_penalty(u, 0.7, 1e-3), lambda u: (u + 1e-3) ** 0.7, [(3, 4)]),
    "penalty with p": (lambda u, p: pf.lp_penalty(u, p, 1e-3), lambda u, p: (u + 1e-3) ** p, [(3, 4), ()]),
    "mask": (product, lambda a, U, m: (a * m) @ U, [(3, 4, 5), (5, 2), (3, 4, 5)]),
    "one mask for all": (product, lambda a, U, m: (a * m) @ U, [(3, 4, 5), (5, 2), (5,)]),
    "no leading axis": (product, lambda a, U, m: (a * m) @ U, [(5,), (5, 2), (5,)]),
    "mask and delta": (
        product_and_delta,
        lambda a, U, m, d, w: (a * (m - d[..., None])) @ U + d[..., None] * w,
        [(3, 4, 5), (5, 2), (3, 4, 5), (3, 4), (3, 4, 2)],
    ),
    "delta alone": (
        delta_alone,
        lambda a, U, d, w: (a * (1 - d[..., None])) @ U + d[..., None] * w,
        [(3, 4, 5), (5, 2), (3, 1), (3, 4, 2)],
    ),
}


@pytest.mark.parametrize("large", [1, derivatives.LARGE])
@pytest.mark.parametrize("name", list(FORMULAS))
def test_values_and_gradients_are_those_of_the_plain_formula(
    name: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derivatives, "LARGE", large)
    ours, plain, shapes = FORMULAS[name]
    leaves = [uniform(*shape, seed=i) for i, shape in enumerate(shapes)]
    runs = []
    for formula in (ours, plain):
        value = formula(*leaves)
        weights = torch.arange(value.numel(), dtype=value.dtype).reshape(value.shape).cos()
        runs.append([value, *torch.autograd.grad((value * weights).sum(), leaves)])
        one = torch.autograd.grad((formula(*leaves) * weights).sum(), leaves[:1])
        torch.testing.assert_close(one[0], runs[-1][1], rtol=1e-12, atol=1e-12)
    for found, expected in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["a source that samples share", "penalty with p", "mask and delta"])
def test_a_compiler_takes_it_in_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivatives, "LARGE", 1)
    ours, _, shapes = FORMULAS[name]
    leaves = [uniform(*shape, seed=i) for i, shape in enumerate(shapes)]
    compiled = torch.compile(ours, backend="aot_eager_decomp_partition", fullgraph=True)
    runs = [[value, *torch.autograd.grad(value.sum(), leaves)] for value in (ours(*leaves), compiled(*leaves))]
    for found, expected in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def kept_by(formula: Callable[[], Tensor], *leaves: Tensor) -> list[Tensor]:
    """What is kept for a backward beside the leaves."""
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        held = formula()
    assert held.requires_grad
    return [x for place, x in kept.items() if place not in {leaf.untyped_storage().data_ptr() for leaf in leaves}]


def test_of_a_masked_product_nothing_of_its_size_is_kept_but_what_came_in(monkeypatch: pytest.MonkeyPatch) -> None:
    a, U, mask, u, p = uniform(3, 4, 5), uniform(5, 2), uniform(3, 4, 5), uniform(3, 4), torch.tensor(0.7)
    source = torch.rand(1, 4, 5).requires_grad_()
    assert len(kept_by(lambda: product(a, U, mask), a, U, mask)) == 1, "a toy keeps a * m"
    monkeypatch.setattr(derivatives, "LARGE", 1)
    assert kept_by(lambda: product(a, U, mask), a, U, mask) == []
    assert kept_by(lambda: pf.interpolate_mask(mask, source), mask, source) == []
    assert kept_by(lambda: pf.lp_penalty(u, p), u, p) == []


@pytest.mark.parametrize("name", ["penalty", "a source of its own", "mask"])
def test_no_second_derivative_is_given_that_would_be_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivatives, "LARGE", 1)
    formula, _, shapes = FORMULAS[name]
    leaves = [uniform(*shape) for shape in shapes]
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(formula(*leaves).sum(), leaves, create_graph=True)


@pytest.mark.parametrize("large", [1, derivatives.LARGE])
def test_under_autocast_products_and_their_gradients_are_those_of_bfloat16(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derivatives, "LARGE", large)
    a, U, mask = (x.detach().float().requires_grad_() for x in (uniform(3, 5), uniform(5, 2), uniform(3, 5, seed=1)))
    with torch.autocast("cpu", torch.bfloat16):
        value = product(a.bfloat16(), U, mask.bfloat16())
    assert value.dtype == torch.bfloat16
    found = torch.autograd.grad(value.float().sum(), [a, U, mask])
    expected = torch.autograd.grad(((a * mask) @ U).sum(), [a, U, mask])
    for x, exact in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, exact, rtol=2e-2, atol=1e-2)
