"""Two decompositions of one weight matrix: how much their rank-one subcomponents have in common."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import max_pool2d

Matching = Literal["hungarian", "greedy"]

HUNGARIAN_ENTRIES = 5000 * 5000
"""Up to so many cosines the matching is the best one, in 2 to 3 s of one core; for twice as many rows and columns it
takes 8 to 22 s and 2 GB. In the worst case, where all prefer the same partners in the same order, 85 s."""
BLOCK_BYTES = 1 << 26
PICTURE_CELLS = 300


def lengths(V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]) -> Float[Tensor, " C"]:
    """||V_c (x) U_c||_F = ||V_c|| ||U_c||, in float64."""
    return V.double().norm(dim=0) * U.double().norm(dim=1)


def cosine_similarity(
    V_a: Float[Tensor, "d_in C_a"],
    U_a: Float[Tensor, "C_a d_out"],
    V_b: Float[Tensor, "d_in C_b"],
    U_b: Float[Tensor, "C_b d_out"],
) -> Float[Tensor, "C_a C_b"]:
    """cos(V_a (x) U_a, V_b (x) U_b) = cos(V_a, V_b) cos(U_a, U_b) of every pair of subcomponents.

    No subcomponent is built as a matrix. Computed in float64, in blocks of rows, and rounded once to float32: so the
    cosine of a subcomponent with itself is 1, not nearly 1. Its sign is that of matrices, which V and U cannot change
    together. One of length 0 has no direction: its cosine with all is 0.
    """
    V_a, V_b = directions(V_a.T), directions(V_b.T)
    U_a, U_b = directions(U_a), directions(U_b)
    cosine = torch.empty(len(V_a), len(V_b), dtype=torch.float32)
    rows = max(1, BLOCK_BYTES // max(1, 8 * len(V_b)))
    for first in range(0, len(V_a), rows):
        block = slice(first, first + rows)
        cosine[block] = (V_a[block] @ V_b.T).mul_(U_a[block] @ U_b.T)
    return cosine.clamp_(-1, 1)


def directions(x: Tensor) -> Float[Tensor, "C d"]:
    """Rows of length 1, or 0 where they have none, in float64 on the CPU."""
    x = x.detach().cpu().double()
    length = x.norm(dim=1, keepdim=True)
    return x / length.where(length > 0, 1.0)


def match(cosine: Float[Tensor, "C_a C_b"]) -> tuple[Int[Tensor, "pairs 2"], Matching]:
    """Partners (a, b), each used once, as many as the smaller side has, by falling cosine; and how they were found.

    `hungarian`: the greatest sum of cosines. `greedy`, above `HUNGARIAN_ENTRIES`: always the most similar pair that is
    left.
    """
    how: Matching = "hungarian" if cosine.numel() <= HUNGARIAN_ENTRIES else "greedy"
    pairs = hungarian_pairs(cosine) if how == "hungarian" else greedy_pairs(cosine)
    return pairs[cosine[pairs[:, 0], pairs[:, 1]].argsort(descending=True, stable=True)], how


def hungarian_pairs(cosine: Float[Tensor, "C_a C_b"]) -> Int[Tensor, "pairs 2"]:
    """The matching of the greatest sum."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cosine.numpy(), maximize=True)
    return torch.stack([torch.from_numpy(rows), torch.from_numpy(columns)], dim=1)


def greedy_pairs(cosine: Float[Tensor, "C_a C_b"]) -> Int[Tensor, "pairs 2"]:
    """The most similar pair, then the most similar of those left, and so on; of equal ones the first row, then column.

    A row keeps its best column in a heap, and looks for another only when it comes up and finds that one taken.
    """
    if not cosine.numel():
        return torch.empty(0, 2, dtype=torch.long)
    taken = torch.zeros(cosine.shape[1])
    values, columns = cosine.max(1)
    heap = list(zip((-values).tolist(), range(len(values)), columns.tolist(), strict=True))
    heapq.heapify(heap)
    pairs: list[tuple[int, int]] = []
    while heap and len(pairs) < cosine.shape[1]:
        _, i, j = heapq.heappop(heap)
        if taken[j] == 0:
            pairs.append((i, j))
            taken[j] = -torch.inf
            continue
        value, j = (cosine[i] + taken).max(0)
        heapq.heappush(heap, (-value.item(), i, int(j)))
    return torch.tensor(pairs)


@dataclass(frozen=True, kw_only=True)
class SiteSimilarity:
    """Decompositions a and b of one site. Only subcomponents of some length that were kept are compared.

    Attributes:
        C: of both.
        zero: how many of the kept ones have length 0, of both: they have no direction and are left out.
        compared: indices of those compared, of both.
        best: of each of them, in that order, the greatest cosine with one of the other; empty where the other has none.
        pairs: indices (a, b) of partners, by falling cosine.
        matched: their cosines.
        matching: how they were found.
        picture: the cosines in the order of the pairs, the rest behind them; of a large site the farthest from 0
            of each cell.
    """

    C: tuple[int, int]
    zero: tuple[int, int]
    compared: tuple[Int[Tensor, " n_a"], Int[Tensor, " n_b"]]
    best: tuple[Float[Tensor, " n_a"], Float[Tensor, " n_b"]]
    pairs: Int[Tensor, "pairs 2"]
    matched: Float[Tensor, " pairs"]
    matching: Matching
    picture: Float[Tensor, "rows columns"]


def compare_site(
    V: tuple[Float[Tensor, "d_in C_a"], Float[Tensor, "d_in C_b"]],
    U: tuple[Float[Tensor, "C_a d_out"], Float[Tensor, "C_b d_out"]],
    keep: tuple[Bool[Tensor, " C_a"], Bool[Tensor, " C_b"]],
) -> SiteSimilarity:
    """Of a and b, the subcomponents in `keep`. The order of either side changes nothing but the indices.

    Holds the cosines once in float32 and, to match them, once in float64: 300 MB where each side keeps 5,000.
    """
    short = [kept & (lengths(v, u).cpu() == 0) for v, u, kept in zip(V, U, keep, strict=True)]
    index = [(kept & ~zero).nonzero().flatten() for kept, zero in zip(keep, short, strict=True)]
    a, b = index
    cosine = cosine_similarity(V[0][:, a], U[0][a], V[1][:, b], U[1][b])
    pairs, how = match(cosine)
    none = torch.empty(0)
    return SiteSimilarity(
        C=(len(keep[0]), len(keep[1])),
        zero=(int(short[0].sum()), int(short[1].sum())),
        compared=(a, b),
        best=(cosine.amax(1), cosine.amax(0)) if cosine.numel() else (none, none),
        pairs=torch.stack([a[pairs[:, 0]], b[pairs[:, 1]]], dim=1),
        matched=cosine[pairs[:, 0], pairs[:, 1]],
        matching=how,
        picture=picture_of(cosine, pairs),
    )


def picture_of(cosine: Float[Tensor, "C_a C_b"], pairs: Int[Tensor, "pairs 2"]) -> Float[Tensor, "rows columns"]:
    """Partners on the diagonal, the rest behind; at most `PICTURE_CELLS` a side, each the cosine farthest from 0."""
    if not cosine.numel():
        return cosine
    rows, columns = (partners_first(pairs[:, side], cosine.shape[side]) for side in (0, 1))
    cell = -(-max(cosine.shape) // PICTURE_CELLS)
    ordered = cosine[rows][:, columns][None]
    if cell == 1:
        return ordered[0]
    highest, lowest = max_pool2d(ordered, cell, ceil_mode=True), -max_pool2d(-ordered, cell, ceil_mode=True)
    return torch.where(highest >= -lowest, highest, lowest)[0]


def partners_first(partners: Int[Tensor, " pairs"], n: int) -> Int[Tensor, " n"]:
    """All of 0 .. n-1, the partners first."""
    rest = torch.ones(n, dtype=torch.bool)
    rest[partners] = False
    return torch.cat([partners, rest.nonzero().flatten()])
