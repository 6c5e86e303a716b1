"""Keyed randomness, tested like a generator: uniform, independent along every part of the key, without structure."""

from __future__ import annotations

import math

import naive
import pytest
import torch
from scipy import stats
from torch import Tensor

from pdlightning.functional import KeyedRandom, key_generator

INT32_EDGES = [0, 1, -1, 2**31 - 1, -(2**31)]


def draw(
    *name: str, rows: Tensor | None = None, seed: int = 0, step: int = 0, size: int = 512, inner: tuple[int, ...] = ()
) -> Tensor:
    samples = torch.arange(512) if rows is None else rows
    now = torch.tensor(step, dtype=torch.int32)
    keys = KeyedRandom.at(seed=seed, step=now, samples=samples.to(torch.int32), inner=inner)
    return keys.uniform(size, *(name or ("draw",)))


def p_of_uniformity(values: Tensor, bins: int) -> float:
    """The p-value of a chi-square test of U[0, 1) over equal bins."""
    return float(stats.chisquare((values.flatten() * bins).long().bincount(minlength=bins)).pvalue)


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard deviations of the correlation of independent numbers."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) * math.sqrt(a.numel())


@pytest.mark.parametrize("step", INT32_EDGES)
def test_numbers_follow_the_written_formula_up_to_the_edges_of_int32(step: int) -> None:
    samples = torch.tensor(INT32_EDGES)
    ours = draw("term", "site", rows=samples, seed=5, step=step, size=3, inner=(2,))
    for i, sample in enumerate(INT32_EDGES):
        for t in range(2):
            key = (5, step & naive.WORD, ("term", "site"), sample & naive.WORD, (t,))
            assert ours[i, t].tolist() == [naive.uniform_number(*key, column) for column in range(3)]


def test_the_same_key_gives_the_same_numbers_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    assert torch.equal(draw("a"), draw("a"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_row_depends_on_its_sample_index_and_not_on_the_batch_around_it() -> None:
    whole = draw(rows=torch.arange(8), inner=(3,))
    halves = [draw(rows=torch.arange(4), inner=(3,)), draw(rows=torch.arange(4, 8), inner=(3,))]
    assert torch.equal(whole, torch.cat(halves))
    assert torch.equal(whole.flip(0), draw(rows=torch.arange(8).flip(0), inner=(3,)))
    assert torch.equal(whole[:, :2], draw(rows=torch.arange(8), inner=(2,)))


def test_numbers_lie_in_the_half_open_unit_interval_and_have_the_moments_of_a_uniform() -> None:
    u = draw(size=2048).double()
    assert 0 <= u.min() < 1e-5 and 1 - 1e-5 < u.max() < 1
    n = u.numel()
    for order in (1, 2, 3, 4):
        mean, variance = 1 / (order + 1), 1 / (2 * order + 1) - 1 / (order + 1) ** 2
        assert abs(float((u**order).mean()) - mean) < 4 * math.sqrt(variance / n), order


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 0), (0, 1), (7, 123456), (0, -1)])
def test_numbers_are_uniform(seed: int, step: int) -> None:
    u = draw(seed=seed, step=step)
    assert p_of_uniformity(u, 256) > 1e-3
    assert p_of_uniformity(u * 2**16 % 1, 256) > 1e-3, "the low bits"
    assert stats.kstest(u.flatten()[: 2**15].numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_numbers_are_uniform_along_each_axis_alone(axis: int) -> None:
    """One column of many samples, one sample of many columns, one sample of many inner positions."""
    n = 2**15
    long = {
        0: draw(rows=torch.arange(n), size=1),
        1: draw(rows=torch.zeros(1), size=n),
        2: draw(rows=torch.zeros(1), inner=(n,), size=1),
    }[axis]
    assert p_of_uniformity(long, 256) > 1e-3


def neighbours() -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of draws whose keys differ in one part."""
    base, inner = draw(), draw(rows=torch.arange(64), inner=(64,), size=64)
    return {
        "step": (base, draw(step=1)),
        "seed": (base, draw(seed=1)),
        "name": (base, draw("other")),
        "sample": (base[:-1], base[1:]),
        "column": (base[:, :-1], base[:, 1:]),
        "distant column": (base[:, :256], base[:, 256:]),
        "inner position": (inner[:, :-1], inner[:, 1:]),
        "sample against inner position": (inner, inner.transpose(0, 1)),
        "sample against column": (base, base.T),
        "step against sample": (base[1:], draw(step=1)[:-1]),
    }


@pytest.mark.parametrize("part", list(neighbours()))
def test_draws_whose_keys_differ_in_one_part_are_independent(part: str) -> None:
    a, b = neighbours()[part]
    if "against" in part and a.shape[0] == a.shape[1]:  # a transpose meets itself on the diagonal, and twice beside it
        upper = torch.ones(a.shape[:2]).triu(1).bool()
        a, b = a[upper], b[upper]
    assert abs(correlation(a, b)) < 4
    cells = (a * 32).floor() * 32 + (b * 32).floor()
    assert p_of_uniformity(cells / 1024, 1024) > 1e-3, "structure among the pairs"


def test_four_corners_of_rows_and_columns_are_independent() -> None:
    """A row word and a column word meet in every number: u[r, c] must not be a function of sums of the two."""
    x = draw().double() - 0.5
    corners = x[::2, ::2] * x[1::2, ::2] * x[::2, 1::2] * x[1::2, 1::2]
    assert abs(float(corners.mean())) < 4 * (1 / 12) ** 2 / math.sqrt(corners.numel())


def test_a_matrix_of_numbers_has_the_spectrum_of_a_random_matrix() -> None:
    x = (draw().double() - 0.5) * math.sqrt(12 / 512)
    largest = float(torch.linalg.svdvals(x)[0])
    assert 1.93 < largest < 2.05  # the edge at 2, up to n ** (-2 / 3)


def test_a_million_rows_have_different_words() -> None:
    steps, samples = 1000, torch.arange(1000, dtype=torch.int32)
    keys = [KeyedRandom.at(seed=0, step=torch.tensor(t, dtype=torch.int32), samples=samples) for t in range(steps)]
    words = torch.stack([k.a.long() * 2**32 + (k.b.long() & 0xFFFFFFFF) for k in keys]).flatten()
    assert len(words.unique()) == len(words)


def test_generators_of_names_differ_and_repeat() -> None:
    first, again, other = (torch.rand(4, generator=key_generator(0, name)) for name in ("a", "a", "b"))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_compiled_draws_equal_eager_ones() -> None:
    def masked_sum(ci: Tensor, step: Tensor, samples: Tensor) -> Tensor:
        r = KeyedRandom.at(seed=0, step=step, samples=samples).uniform(4, "term", "site")
        return ci + (1 - ci) * r

    arguments = (torch.full((6, 4), 0.25), torch.tensor(3, dtype=torch.int32), torch.arange(6, dtype=torch.int32))
    assert torch.equal(torch.compile(masked_sum, fullgraph=True)(*arguments), masked_sum(*arguments))
