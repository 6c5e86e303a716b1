from __future__ import annotations

import numpy as np
import pytest
import torch

from pdlightning.figures import plot_l0_by_position


@pytest.mark.parametrize("length", [1, 2, 512])
def test_the_total_comes_first_and_then_each_site(length: int) -> None:
    l0 = {f"h.{i}.attn.q_proj": torch.rand(length, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    figure = plot_l0_by_position(l0, threshold=0.1)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["total", *l0]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), torch.stack(list(l0.values())).sum(0), rtol=1e-6)
    np.testing.assert_array_equal(figure.axes[2].lines[0].get_ydata(), l0["h.1.attn.q_proj"])
    assert all(ax.get_ylim()[0] == 0 for ax in figure.axes)
    assert "ci > 0.1" in figure.get_suptitle()
    figure.canvas.draw()


def test_nothing_that_fires_can_be_drawn() -> None:
    plot_l0_by_position({"out": torch.zeros(4)}, threshold=0.1).canvas.draw()


@pytest.mark.parametrize(
    ("l0", "said"),
    [
        ({}, "nothing to draw"),
        ({"a": torch.tensor([1.0, torch.nan])}, "L0 of site 'a': 1 of 2 values are not finite"),
        ({"a": torch.ones(3), "b": torch.ones(4)}, r"L0 of site 'b': expected a tensor of shape \(3,\), got \(4,\)"),
    ],
)
def test_what_cannot_be_drawn_is_named(l0: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plot_l0_by_position(l0, threshold=0.1)
