"""Cosines of rank-one matrices against the matrices themselves; matchings against searches."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdlightning.analysis import similarity
from pdlightning.analysis.similarity import compare_site, cosine_similarity, greedy_pairs, match, picture_of
from pdlightning.rehearsal.dry import Counter


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(C: int, *, d_in: int = 5, d_out: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(d_in, C, seed=2 * seed), normal(C, d_out, seed=2 * seed + 1)


def order(n: int, seed: int = 0) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def naive_cosines(V_a: Tensor, U_a: Tensor, V_b: Tensor, U_b: Tensor) -> Tensor:
    """With every subcomponent as a matrix, in float64."""
    a, b = (
        [torch.outer(v, u).double().flatten() for v, u in zip(V.T, U, strict=True)] for V, U in ((V_a, U_a), (V_b, U_b))
    )
    return torch.tensor([[float(x @ y / (x.norm() * y.norm())) for y in b] for x in a])


def everything(C_a: int, C_b: int) -> tuple[Tensor, Tensor]:
    return torch.ones(C_a, dtype=torch.bool), torch.ones(C_b, dtype=torch.bool)


@pytest.mark.parametrize("block_bytes", [1, 8 * 7 * 2, 1 << 26])
def test_cosines_are_those_of_the_matrices_in_any_blocks(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(similarity, "BLOCK_BYTES", block_bytes)
    a, b = factors(6, seed=0), factors(7, seed=1)
    torch.testing.assert_close(cosine_similarity(*a, *b), naive_cosines(*a, *b), rtol=0, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.floats(1e-8, 1e8))
def test_a_decomposition_is_itself_exactly_in_any_order_sign_and_length(
    C: int, d_in: int, d_out: int, seed: int, scale: float
) -> None:
    V, U = factors(C, d_in=d_in, d_out=d_out, seed=seed)
    signs, shuffled = normal(C, seed=seed + 1).sign(), order(C, seed)
    other = (V * signs * scale)[:, shuffled], (U / scale * signs[:, None])[shuffled]
    found = compare_site((V, other[0]), (U, other[1]), everything(C, C))
    for values in (*found.best, found.matched):
        assert len(values) == C and bool((values == 1).all())
    for a, b in found.pairs.tolist():
        if d_in > 2 and d_out > 2:  # where two hardly ever are alike
            assert int(shuffled[b]) == a


def test_a_flipped_u_alone_is_another_matrix() -> None:
    V, U = factors(3)
    assert bool((cosine_similarity(V, U, V, -U).diagonal() == -1).all())


def test_sums_do_not_depend_on_the_order_and_exchange_with_the_sides() -> None:
    a, b = factors(8, seed=0), factors(6, seed=1)
    here = compare_site((a[0], b[0]), (a[1], b[1]), everything(8, 6))
    there = compare_site((b[0], a[0]), (b[1], a[1]), everything(6, 8))
    i, j = order(8), order(6)
    moved = compare_site((a[0][:, i], b[0][:, j]), (a[1][i], b[1][j]), everything(8, 6))
    for other, (first, second) in ((there, (1, 0)), (moved, (0, 1))):
        assert torch.equal(here.matched, other.matched)
        assert torch.equal(here.best[0].sort().values, other.best[first].sort().values)
        assert torch.equal(here.best[1].sort().values, other.best[second].sort().values)
    assert {(int(i[x]), int(j[y])) for x, y in moved.pairs.tolist()} == {(x, y) for x, y in here.pairs.tolist()}


def test_best_is_the_greatest_cosine_of_each_side() -> None:
    a, b = factors(6, seed=0), factors(4, seed=1)
    cosine = naive_cosines(*a, *b)
    found = compare_site((a[0], b[0]), (a[1], b[1]), everything(6, 4))
    torch.testing.assert_close(found.best[0], cosine.amax(1), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.best[1], cosine.amax(0), rtol=0, atol=1e-7)
    assert len(found.pairs) == 4 and len(set(found.pairs[:, 0].tolist())) == 4


@pytest.mark.parametrize("C_b", [3, 5])
def test_the_small_matching_is_the_best_of_all(C_b: int) -> None:
    for seed in range(5):
        cosine = normal(5, C_b, seed=seed).tanh()
        pairs, how = match(cosine)
        best = max(sum(float(cosine[i, j]) for j, i in enumerate(p)) for p in permutations(range(5), C_b))
        assert how == "hungarian" and float(cosine[pairs[:, 0], pairs[:, 1]].sum()) == pytest.approx(best)


def naive_greedy(cosine: Tensor) -> list[tuple[int, int]]:
    ranked = sorted((-float(cosine[i, j]), i, j) for i in range(len(cosine)) for j in range(cosine.shape[1]))
    rows: set[int] = set()
    columns: set[int] = set()
    taken = []
    for _, i, j in ranked:
        if i not in rows and j not in columns:
            rows.add(i)
            columns.add(j)
            taken.append((i, j))
    return taken


@pytest.mark.parametrize("shape", [(7, 7), (9, 4), (4, 9), (1, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_large_matching_takes_the_most_similar_pair_that_is_left(shape: tuple[int, int], ties: bool) -> None:
    for seed in range(5):
        cosine = normal(*shape, seed=seed).tanh()
        cosine = (cosine * 2).round() / 2 if ties else cosine
        assert [tuple(pair) for pair in greedy_pairs(cosine).tolist()] == naive_greedy(cosine)


def test_above_a_size_the_matching_is_greedy_and_a_copy_is_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "HUNGARIAN_ENTRIES", 63)
    V, U = factors(8)
    found = compare_site((V, V), (U, U), everything(8, 8))
    assert found.matching == "greedy" and bool((found.matched == 1).all())
    assert compare_site((V, V[:, :7]), (U, U[:7]), everything(8, 7)).matching == "hungarian"


def test_only_the_kept_are_compared_under_their_own_numbers() -> None:
    V, U = factors(6)
    keep = torch.tensor([False, True, False, True, True, False])
    found = compare_site((V, V), (U, U), (keep, torch.ones(6, dtype=torch.bool)))
    assert found.compared[0].tolist() == [1, 3, 4] and found.C == (6, 6)
    assert sorted(found.pairs.tolist()) == [[1, 1], [3, 3], [4, 4]] and bool((found.matched == 1).all())
    assert len(found.best[1]) == 6 and int((found.best[1] == 1).sum()) == 3


def test_subcomponents_of_length_zero_are_counted_and_left_out() -> None:
    V, U = factors(5)
    V[:, 1], U[3] = 0.0, 0.0
    found = compare_site((V, V), (U, U), everything(5, 5))
    assert found.zero == (2, 2) and found.compared[0].tolist() == [0, 2, 4]
    assert bool((found.matched == 1).all()) and len(found.matched) == 3
    assert bool((cosine_similarity(V, U, V, U)[1] == 0).all())


def test_a_side_without_anything_kept_has_nothing_to_say() -> None:
    V, U = factors(4)
    found = compare_site((V, V), (U, U), (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)))
    assert not len(found.best[0]) and not len(found.best[1]) and not len(found.pairs)


def test_the_picture_has_partners_on_the_diagonal_and_keeps_the_strongest_of_a_cell() -> None:
    V, U = factors(10)
    pairs, _ = match(cosine := cosine_similarity(V, U, V[:, order(10)], U[order(10)]))
    assert bool((picture_of(cosine, pairs).diagonal() == 1).all())
    large = torch.zeros(700, 650)
    large[0, 649], large[699, 0] = -0.75, 0.5
    picture = picture_of(large, torch.empty(0, 2, dtype=torch.long))
    assert picture.shape == (234, 217) and float(picture[0, 216]) == -0.75 and float(picture[233, 0]) == 0.5
    assert int((picture != 0).sum()) == 2


def test_subcomponents_are_never_built_as_matrices() -> None:
    """400 of 300 x 400 would be 192 MB; a matrix of cosines is 0.6, V and U in float64 are 4.5."""
    a, b = factors(400, d_in=300, d_out=400, seed=0), factors(400, d_in=300, d_out=400, seed=1)
    with Counter() as counter:
        cosine_similarity(*a, *b)
    assert 5e6 < counter.peak < 15e6
