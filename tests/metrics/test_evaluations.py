"""Evaluations: against the oracle, against parts of a batch, and on a target whose truth is known (spec 8)."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from parity import SEED, STEP, Chain, assert_same, batch_of, built, observed, oracle_of
from torch import nn

from pdlightning.metrics import (
    CIL0,
    DenseError,
    Evaluation,
    HiddenActsError,
    IdentityError,
    OutputKL,
    OutputMSE,
    PGDLadder,
    WeightMatch,
)
from pdlightning.modules import ComponentModel, ScalarMLP

pytestmark = pytest.mark.usefixtures("float64")


def updated(evaluation: Evaluation, model: ComponentModel, *parts: tuple[torch.Tensor, int]) -> dict[str, Any]:
    evaluation.prepare(model)
    for batch, first in parts:
        evaluation.update(observed(model, batch, first=first))
    return evaluation.compute()


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_l0_of_sites_groups_and_total_equals_the_oracle(threshold: float) -> None:
    model, batch = built("tokens"), batch_of("tokens", (4, 3))
    found = updated(CIL0(threshold=threshold, groups={"convs": "conv*"}), model, (batch, 0))
    lower = observed(model, batch).ci.lower
    expected = naive.ci_l0(lower, threshold, {"convs": ["conv*"]})
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize(
    "make", [lambda: CIL0(threshold=0.1, groups={"all": "*"}), HiddenActsError], ids=["l0", "hidden_acts"]
)
def test_unequal_parts_of_a_batch_give_the_value_of_the_whole(make: Any) -> None:
    model, batch = built(), batch_of("vectors", (8, 2))
    whole = updated(make(), model, (batch, 0))
    parts = updated(make(), model, (batch[:3], 0), (batch[3:], 3))
    assert whole.keys() == parts.keys()
    for name in whole:
        assert_same(parts[name].double(), whole[name].double(), name)


def test_hidden_activation_error_is_per_element_under_the_ci_masking() -> None:
    model, batch = built(), batch_of("vectors", (4,))
    target, _ = oracle_of(model)
    lower = {s: x.detach() for s, x in observed(model, batch).ci.lower.items()}
    masked, clean = naive.forward(target, batch, lower, {}), naive.clean_forward(target, batch)
    found = updated(HiddenActsError(), model, (batch, 0))
    for site in lower:
        expected = naive.value(naive.mse(clean["outputs"][site], masked["outputs"][site]))
        assert_same(found[site].detach(), expected.detach(), site)


@pytest.mark.parametrize(("comparison", "kind"), [(OutputMSE(), "mse"), (OutputKL(), "kl")])
def test_every_rung_of_the_ladder_is_the_oracle_at_that_number_of_ascents(comparison: Any, kind: str) -> None:
    model, batch, rungs = built(), batch_of("vectors", (4,)), [1, 2, 5]
    target, _ = oracle_of(model)
    ladder = PGDLadder(rungs=rungs, step_size=0.1, comparison=comparison)
    ladder.term = "ladder"
    with torch.no_grad():
        found = updated(ladder, model, (batch, 0))
    lower = {s: x.detach() for s, x in observed(model, batch).ci.lower.items()}
    draws = naive.Draws(SEED, STEP, tuple(range(4)))

    def objective(r: naive.PerSite, d: naive.PerSite) -> naive.Pair:
        return naive.reconstruction(target, batch, lower, r, d, None, kind)

    for rung in rungs:
        start = naive.pgd_init(draws, target["sites"], "ladder", init="random", scope="shared")
        sources, deltas = naive.pgd(objective, *start, n_steps=rung, step_size=0.1)
        assert_same(found[f"steps_{rung}"], naive.value(objective(sources, deltas)).detach(), f"rung {rung}")


def solved(C: int = 5) -> ComponentModel:
    """ReLU(diag(w) x) of four features, taken apart: subcomponent c is feature c, read by its own ci network."""
    linear = nn.Linear(4, 4, bias=False)
    model = ComponentModel(
        target=Chain({"linear": linear, "relu": nn.ReLU()}).requires_grad_(False),
        sites={"linear": C}, ci_fn=ScalarMLP(hidden=[1]),
    )  # fmt: skip
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 0.5, 1.5])))
        c = model.components["linear"]
        c.V.copy_(torch.eye(4, C))
        c.U.zero_()[:4] = linear.weight
        for parameter, value in zip(model.ci_fn.parameters(), (1.0, 10.0, 0.0, -1.0), strict=True):
            parameter.fill_(value)
    return model


def test_a_solved_target_has_no_errors_and_matches_its_weights() -> None:
    model, batch = solved(), torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    found = updated(IdentityError(sites="linear", n_features=4), model, (batch, 0))
    assert {name: int(value) for name, value in found.items()} == {"tol_0.1": 0, "tol_0.2": 0, "recovered": 4}
    for axis in ("columns", "rows"):
        match = updated(WeightMatch(site="linear", axis=axis), model, (batch, 0))
        assert {name: float(value) for name, value in match.items()} == pytest.approx({"mmcs": 1, "ml2r": 1})
    dense = updated(DenseError(site="linear", k=4, n_features=4), model, (batch, 0))
    assert (int(dense["tol_0.1"]), int(dense["firing"])) == (0, 4)
    assert int(updated(DenseError(site="linear", k=2, n_features=4), model, (batch, 0))["tol_0.1"]) == 2


def test_a_subcomponent_that_shrinks_shows_in_length_and_not_in_direction() -> None:
    model = solved()
    model.components["linear"].U.data *= 0.5
    match = updated(WeightMatch(site="linear", axis="columns"), model, (torch.rand(2, 4), 0))
    assert (float(match["mmcs"]), float(match["ml2r"])) == pytest.approx((1, 0.5))


def test_features_that_share_a_subcomponent_are_errors() -> None:
    model = solved()
    model.components["linear"].V.data[1] = model.components["linear"].V.data[0]
    found = updated(IdentityError(sites="linear", n_features=4), model, (torch.rand(2, 4), 0))
    assert int(found["tol_0.1"]) == 2, "one stray entry, one feature without its own"
    assert int(found["recovered"]) == 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: IdentityError(sites="nope", n_features=4), "'nope' matches no site.*linear"),
        (lambda: DenseError(site="nope", k=1, n_features=4), "'nope' matches no site"),
        (lambda: CIL0(threshold=0.1, groups={"g": "nope"}), "'nope' matches no site"),
        (lambda: WeightMatch(site="linear", axis="diagonal"), "columns or rows, got 'diagonal'"),  # type: ignore[arg-type]
        (lambda: PGDLadder(rungs=[5, 2], step_size=0.1, comparison=OutputMSE()), r"rising numbers.*\[5, 2\]"),
        (lambda: PGDLadder(rungs=[], step_size=0.1, comparison=OutputMSE()), "rising numbers"),
    ],
)
def test_impossible_evaluations_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make().prepare(solved())
