"""Two runs compared, site by site, and the numbers of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pdlightning.analysis.evaluation import mean_ci
from pdlightning.analysis.similarity import SiteSimilarity, compare_site
from pdlightning.loading import LoadedRun
from pdlightning.modules.component_model import ComponentsBySite

FIRING = 1e-3
"""Of the mean ci over evaluation data, as in `active_0.001` of language models."""
NAMED = 8
"""Sites that a sentence names before it says how many more there are."""


class NotComparable(ValueError):
    """The runs have nothing to compare; the message says what each of them has."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One site of two runs. `target_difference`: ||W_a - W_b||_F / ||W_a||_F of the weights that they decompose."""

    similarity: SiteSimilarity
    target_difference: float


def common_sites(a: ComponentsBySite, b: ComponentsBySite, pattern: str = "*") -> list[str]:
    """The sites of both that fit an fnmatch pattern; a `NotComparable` if there are none or one has two shapes."""
    found = [site for site in a if site in b and fnmatchcase(site, pattern)]
    if not found:
        which = "no site" if pattern == "*" else f"no site that fits {pattern!r}"
        raise NotComparable(
            f"The two runs have {which} in common. Sites of A: {in_words(a)}. Sites of B: {in_words(b)}."
        )
    sizes = {site: [f"{side[site].d_out} x {side[site].d_in}" for side in (a, b)] for site in found}
    if other := [f"{site} is {of_a} in A and {of_b} in B" for site, (of_a, of_b) in sizes.items() if of_a != of_b]:
        raise NotComparable(
            f"Weights of one name have different shapes: {in_words(other)}. Compare runs of one target, or choose "
            f"other sites with --sites. Sites of A: {in_words(a)}. Sites of B: {in_words(b)}."
        )
    return found


def in_words(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def compare_runs(
    a: LoadedRun, b: LoadedRun, *, sites: str = "*", firing: float | None = FIRING
) -> Iterator[tuple[str, Row]]:
    """(site, comparison) of each site that two runs have in common, one at a time.

    Args:
        a, b: runs from `load_run`.
        sites: an fnmatch pattern of sites.
        firing: only subcomponents whose mean lower ci over the evaluation data of their run is greater; None: all.

    Raises:
        NotComparable: no site in common, or weights of other shapes; raised before anything is computed.
    """
    sides = (a.decomposition.components, b.decomposition.components)
    common = common_sites(*sides, sites)
    keep_a = kept(a, firing)
    keep_b = keep_a if b is a else kept(b, firing)
    for site in common:
        of_a, of_b = (side[site] for side in sides)
        with torch.no_grad():
            similarity = compare_site((of_a.V, of_b.V), (of_a.U, of_b.U), (keep_a[site], keep_b[site]))
            difference = relative_difference(of_a.target_weight, of_b.target_weight)
        yield site, Row(similarity=similarity, target_difference=difference)


def kept(run: LoadedRun, firing: float | None) -> dict[str, Bool[Tensor, " C"]]:
    """site -> which subcomponents are compared."""
    if firing is None:
        return {site: torch.ones(c.C, dtype=torch.bool) for site, c in run.decomposition.components.items()}
    return {site: ci > firing for site, ci in mean_ci(run).items()}


def relative_difference(a: Float[Tensor, "d_out d_in"], b: Float[Tensor, "d_out d_in"]) -> float:
    """||a - b|| / ||a||; 0 of equal ones, also of zeros."""
    a, b = a.cpu().double(), b.cpu().double()
    difference = float((a - b).norm())
    return difference / length if difference and (length := float(a.norm())) else difference


def mean(values: Tensor) -> float | None:
    """In float64; None of nothing."""
    return float(values.double().mean()) if len(values) else None


def numbers(row: Row) -> dict[str, Any]:
    """The row of one site in compare.csv and compare.json."""
    s = row.similarity
    return {
        **counts(s),
        "mmcs_a_to_b": mean(s.best[0]),
        "mmcs_b_to_a": mean(s.best[1]),
        "pairs": len(s.pairs),
        "mean_matched_cosine": mean(s.matched),
        "matching": s.matching,
        "target_difference": row.target_difference,
    }


def counts(s: SiteSimilarity) -> dict[str, int]:
    of_both = {"C": s.C, "compared": tuple(map(len, s.compared)), "zero": s.zero}
    return {f"{name}_{side}": n for name, pair in of_both.items() for side, n in zip("ab", pair, strict=True)}


def total(rows: Sequence[Row]) -> dict[str, Any]:
    """Over all sites, every subcomponent and every pair counting once."""
    every = [row.similarity for row in rows]
    each = [counts(s) for s in every]
    return {
        **{name: sum(count[name] for count in each) for name in each[0]},
        "mmcs_a_to_b": mean(torch.cat([s.best[0] for s in every])),
        "mmcs_b_to_a": mean(torch.cat([s.best[1] for s in every])),
        "pairs": sum(len(s.pairs) for s in every),
        "mean_matched_cosine": mean(torch.cat([s.matched for s in every])),
        "matching": ", ".join(dict.fromkeys(s.matching for s in every)),
        "target_difference": max(row.target_difference for row in rows),
    }
