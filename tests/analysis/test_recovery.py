"""Where the cross-entropy of a decomposition lies on the training of its target."""

from __future__ import annotations

import math

import pytest

from pdlightning.analysis.recovery import Recovered, training_compute_recovered

CURVE = [(100, 5.0), (200, 4.0), (400, 3.5), (800, 3.0)]


@pytest.mark.parametrize(
    ("difference", "share"),
    [(0.0, 1.0), (0.5, 0.5), (1.0, 0.25), (2.0, 0.125), (0.25, math.sqrt(0.5)), (0.75, math.sqrt(0.125)), (-0.3, 1.0)],
)
def test_points_of_the_curve_and_geometric_means_halfway_between(difference: float, share: float) -> None:
    """3.25 lies halfway between the losses of 400 and 800 steps: at sqrt(400 * 800), a share of sqrt(1/2)."""
    found = training_compute_recovered(CURVE, difference)
    assert found.share == pytest.approx(share) and not found.at_most


def test_a_logarithmic_curve_is_followed_exactly_between_its_points() -> None:
    curve = [(step, 10 - math.log(step)) for step in (10, 70, 300, 1000)]
    for share in (0.9, 0.5, 0.123, 0.02):
        assert training_compute_recovered(curve, -math.log(share)).share == pytest.approx(share)


def test_above_the_beginning_of_the_curve_only_a_bound_is_known() -> None:
    assert training_compute_recovered(CURVE, 2.5) == Recovered(0.125, at_most=True)
    assert training_compute_recovered([(4, 6.0)], 0.1) == Recovered(1.0, at_most=True)


def test_of_a_curve_that_rises_again_the_first_crossing_counts() -> None:
    assert training_compute_recovered([(100, 5.0), (200, 3.0), (400, 3.5)], 0.0).share == pytest.approx(2**0.75 / 4)


def test_a_curve_or_a_number_that_cannot_be_placed_is_refused() -> None:
    for curve in ([], [(0, 7.0), (100, 5.0)]):
        with pytest.raises(ValueError, match="needs points at steps above 0"):
            training_compute_recovered(curve, 0.1)
    with pytest.raises(ValueError, match="must be finite to be placed, got nan"):
        training_compute_recovered(CURVE, math.nan)
