from __future__ import annotations

import pytest

from pdlightning.figures.pretraining import plot_pretraining

ROWS = [{"step": 10.0, "train": 5.0, "validation": 5.1}, {"step": 20.0, "train": 4.0, "validation": 4.2}]


def test_both_losses_and_the_unigram_entropy_are_drawn_where_they_are():
    (ax,) = plot_pretraining(ROWS, unigram_entropy=6.0).axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}
    assert drawn["train"] == ([10, 20], [5.0, 4.0]) and drawn["validation"] == ([10, 20], [5.1, 4.2])
    assert drawn["unigram entropy"][1] == [6.0, 6.0]


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="'train' is nan at step 30"):
        plot_pretraining([*ROWS, {"step": 30.0, "train": float("nan"), "validation": 4.0}], unigram_entropy=6.0)
