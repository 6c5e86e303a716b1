"""Schedules land where they must (spec S1, L3)."""

from __future__ import annotations

import math

import naive
import pytest

from pdlightning.functional import schedule_value
from pdlightning.schedules import Anneal, Schedule, Scheduled

KINDS = ["constant", "linear", "cosine"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup_frac", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_every_step_equals_the_oracle(kind: str, warmup_frac: float, steps: int) -> None:
    schedule = Schedule(start=3.0, kind=kind, warmup_frac=warmup_frac, final_frac=0.1)  # type: ignore[arg-type]
    ours = [schedule(step, steps) for step in range(steps)]
    theirs = [naive.schedule_value(step, steps, 3.0, kind, warmup_frac, 0.1) for step in range(steps)]
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("kind", "middle"), [("constant", 2.0), ("linear", 1.1), ("cosine", 1.1)])
def test_start_middle_and_end(kind: str, middle: float) -> None:
    values = [schedule_value(step, 101, 2.0, kind, 0.0, 0.1) for step in (0, 50, 100)]  # type: ignore[arg-type]
    assert values[0] == 2.0, "the first step is exactly the start"
    assert values[1] == pytest.approx(middle)
    assert values[2] == (2.0 if kind == "constant" else 0.2), "the last step is exactly the end"


def test_cosine_is_half_a_period() -> None:
    values = [schedule_value(step, 101, 1.0, "cosine", 0.0, 0.0) for step in range(101)]
    assert values[25] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert all(a > b for a, b in zip(values, values[1:], strict=False))


def test_warmup_rises_linearly_from_zero_to_exactly_the_start() -> None:
    values = [schedule_value(step, 100, 4.0, "linear", 0.1, 0.0) for step in range(100)]
    assert values[:11] == pytest.approx([0.4 * step for step in range(11)])
    assert values[10] == 4.0 and values[99] == 0.0


def test_a_schedule_stays_at_its_end_after_the_last_step() -> None:
    assert schedule_value(150, 100, 1.0, "cosine", 0.0, 0.25) == pytest.approx(0.25)


def test_anneal_equals_the_oracle_and_geometric_is_linear_in_the_logarithm() -> None:
    arguments = {"start_frac": 0.25, "end_frac": 0.75}
    anneal = Anneal(start=2.0, end=0.5, **arguments)
    for step in range(21):
        expected = naive.annealed_p(step, 21, p_start=2.0, p_end=0.5, **arguments)
        assert anneal(step, 21) == pytest.approx(expected, rel=1e-12)
    assert Anneal(start=1.0, end=0.01, geometric=True)(10, 21) == pytest.approx(0.1)


def test_scheduled_numbers_hold_the_value_of_their_step() -> None:
    moving, fixed = Scheduled(Schedule(start=1.0, kind="linear", final_frac=0.0)), Scheduled(0.5)
    for step, value in ((0, 1.0), (5, 0.5), (10, 0.0)):
        moving.set(step, 11)
        fixed.set(step, 11)
        assert (float(moving.now), fixed.now) == (pytest.approx(value), 0.5)
    assert not moving.state_dict(), "a value of the step is no state"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Schedule(start=1.0, warmup_frac=1.5), r"warmup_frac.*\[0, 1\], got 1.5"),
        (lambda: Schedule(start=1.0, kind="cosin"), "'cosin'.*constant, linear or cosine"),  # type: ignore[arg-type]
        (lambda: Schedule(start=float("inf")), "finite"),
        (lambda: Schedule(start=1.0, final_frac=-0.1), "final_frac"),
        (lambda: Anneal(start=1.0, end=2.0, start_frac=0.6, end_frac=0.5), "end_frac must not come before"),
        (lambda: Anneal(start=1.0, end=0.0, geometric=True), "above 0"),
        (lambda: Anneal(start=1.0, end=2.0, end_frac=2.0), r"end_frac.*got 2.0"),
    ],
)
def test_impossible_schedules_are_refused(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]
