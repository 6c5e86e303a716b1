"""Formulas of the evaluation of vectors (spec E1, E3, E4)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

COSINE_TIE = 1e-6


def l0(ci: Float[Tensor, "*leading C"], threshold: float) -> Float[Tensor, " *leading"]:
    """The number of subcomponents with ci > threshold at each position (spec E1)."""
    return (ci > threshold).sum(-1)


def identity_matching(ci: Float[Tensor, "n C"]) -> Int[Tensor, " C"]:
    """The column order that puts the greatest total ci on the diagonal (Hungarian), the unmatched columns after it."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(ci.detach().double().cpu().numpy(), maximize=True)
    matched = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    rest = [c for c in range(ci.shape[1]) if c not in matched.values()]
    return torch.tensor([matched[r] for r in sorted(matched)] + rest, device=ci.device)


def permute_to_identity(ci: Float[Tensor, "n C"]) -> tuple[Float[Tensor, "n C"], Int[Tensor, " C"]]:
    """The columns of `ci` in the order of `identity_matching`, and that order."""
    order = identity_matching(ci)
    return ci[:, order], order


def identity_ci_error(ci: Float[Tensor, "n C"], tolerance: float = 0.1) -> int:
    """#(off-diagonal > tol) + #(diagonal < 1 - tol) after the best column matching; 0 is a perfect identity (spec E3).

    With fewer columns than rows, the rows without a column of their own count one each.
    """
    matched, _ = permute_to_identity(_at_least_square(ci))
    diagonal = matched.diagonal()
    stray = int((matched > tolerance).sum()) - int((diagonal > tolerance).sum())
    return stray + int((diagonal < 1 - tolerance).sum())


def _at_least_square(ci: Float[Tensor, "n C"]) -> Tensor:
    """With columns of zeros added until there are as many as rows."""
    return torch.nn.functional.pad(ci, (0, max(ci.shape[0] - ci.shape[1], 0)))


def recovered_features(ci: Float[Tensor, "n C"], tolerance: float = 0.1) -> int:
    """#rows with ci >= 1 - tol at their matched column, <= tol at every other, no other row > tol in that column."""
    matched, _ = permute_to_identity(_at_least_square(ci))
    strong = matched.diagonal() >= 1 - tolerance
    n = len(strong)
    stray = (matched > tolerance).sum(1)[:n] + (matched[:, :n] > tolerance).sum(0)
    return int((strong & (stray == 2)).sum())


def dense_order(ci: Float[Tensor, "n C"]) -> Int[Tensor, " C"]:
    """Columns by falling mass."""
    return ci.sum(0).argsort(descending=True, stable=True)


def dense_ci_error(ci: Float[Tensor, "n C"], k: int, tolerance: float = 0.1) -> int:
    """Columns sorted by mass: the missing strong (>= 1 - tol) ones among the first k + every entry > tol in the rest.

    A dense pattern is exactly k columns, each strong for some input: a column of the first k without any strong entry
    counts one, so fewer than k columns are errors as well as more (spec E3).
    """
    if not 0 <= k <= ci.shape[1]:
        raise ValueError(f"dense_ci_error: k must be between 0 and the number of columns {ci.shape[1]}, got {k}.")
    columns = ci[:, dense_order(ci)]
    strong_columns = (columns[:, :k] >= 1 - tolerance).any(0)
    return int((~strong_columns).sum()) + int((columns[:, k:] > tolerance).sum())


def mean_max_cosine_similarity(
    weight: Float[Tensor, "d_out d_in"], V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]
) -> Float[Tensor, ""]:
    """MMCS: mean over the columns j of W of max_c cos(U_c V_{c,j}, W_j); 1 is perfect (spec E4)."""
    return _column_cosines(weight, V, U).max(-1).values.mean()


def mean_l2_ratio(
    weight: Float[Tensor, "d_out d_in"], V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]
) -> Float[Tensor, ""]:
    """ML2R: mean over j of ||U_c V_{c,j}|| / ||W_j|| at the c of greatest cosine; 1 is no shrinkage (spec E4).

    Of the c that share the greatest cosine up to `COSINE_TIE` the longest counts: in few dimensions a dead subcomponent
    may point the same way by chance.
    """
    cosine = _column_cosines(weight, V, U)
    length = U.norm(dim=-1) * V.abs()
    tied = cosine >= cosine.max(-1, keepdim=True).values - COSINE_TIE
    return (length.where(tied, 0.0).max(-1).values / weight.norm(dim=0)).mean()


def _column_cosines(weight: Tensor, V: Tensor, U: Tensor) -> Float[Tensor, "d_in C"]:
    """cos(U_c V_{c,j}, W_j) = sign(V_{c,j}) cos(U_c, W_j), no matrix built; that of a zero column is 0."""
    directions = torch.nn.functional.normalize(weight, dim=0).T @ torch.nn.functional.normalize(U, dim=-1).T
    return directions * V.sign()
