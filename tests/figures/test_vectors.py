from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.quiver import Quiver

from pdlightning.figures import plot_tms_vectors


def draws(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("C", [1, 20, 500])
def test_arrows_are_the_columns_of_the_target_and_of_each_subcomponent(C: int) -> None:
    weight, V, U = draws(2, 5, seed=0), draws(5, C, seed=1), draws(C, 2, seed=2)
    firing = torch.arange(C) % 4 == 0
    left, right = plot_tms_vectors(weight, V, U, firing=firing).axes
    (target,) = [q for q in left.collections if isinstance(q, Quiver)]
    np.testing.assert_allclose(np.stack([target.U, target.V]), weight, rtol=1e-6)
    quiet, *coloured = [q for q in right.collections if isinstance(q, Quiver)]
    assert len(coloured) == int(firing.sum())
    for arrows, c in zip(coloured, torch.nonzero(firing).flatten().tolist(), strict=True):
        np.testing.assert_allclose(np.stack([arrows.U, arrows.V]).T, V[:, c, None] * U[c], rtol=1e-5)
    assert len(quiet.U) == 5 * int((~firing).sum())


def test_arrows_lie_inside_the_panel() -> None:
    weight, V, U = draws(2, 5, seed=0), 3 * draws(5, 4, seed=1), draws(4, 2, seed=2)
    _, right = plot_tms_vectors(weight, V, U, firing=torch.ones(4, dtype=torch.bool)).axes
    tips = V.T[:, :, None] * U[:, None, :]
    assert right.get_xlim()[1] > float(tips.abs().max())
    right.figure.canvas.draw()


def test_more_dimensions_show_cosines_and_lengths_with_matched_firing_subcomponents_first() -> None:
    weight = torch.linalg.qr(draws(6, 6, seed=0)).Q
    V, U = torch.zeros(6, 9), draws(9, 6, seed=1)
    place = [8, 3, 5, 0, 7, 2]
    for j, c in enumerate(place):
        V[j, c], U[c] = -0.5, -weight[:, j]
    firing = torch.zeros(9, dtype=torch.bool)
    firing[place] = True
    direction, length = (
        np.asarray(ax.images[0].get_array()) for ax in plot_tms_vectors(weight, V, U, firing=firing).axes[:2]
    )
    np.testing.assert_allclose(direction[:, :6], np.eye(6), atol=1e-6)
    np.testing.assert_allclose(length[:, :6], 0.5 * np.eye(6), atol=1e-6)
    assert (length[:, 6:] == 0).all()


def test_cosines_agree_with_explicit_rank_one_columns() -> None:
    weight, V, U = draws(3, 4, seed=0), draws(4, 2, seed=1), draws(2, 3, seed=2)
    figure = plot_tms_vectors(weight, V, U, firing=torch.ones(2, dtype=torch.bool))
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    expected = torch.tensor(
        [[torch.cosine_similarity(U[c] * V[j, c], weight[:, j], dim=0) for c in range(2)] for j in range(4)]
    )
    assert any(np.allclose(drawn, expected[:, order], atol=1e-6) for order in ([0, 1], [1, 0]))


def test_bad_inputs_name_the_tensor() -> None:
    weight, V, U, firing = torch.ones(2, 5), torch.ones(5, 3), torch.ones(3, 2), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="V: 15 of 15 values are not finite"):
        plot_tms_vectors(weight, V * torch.nan, U, firing=firing)
    with pytest.raises(ValueError, match=r"U: expected a tensor of shape \(3, 2\), got \(2, 3\)"):
        plot_tms_vectors(weight, V, U.T, firing=firing)
    with pytest.raises(ValueError, match=r"firing: expected a tensor of shape \(3,\), got \(2,\)"):
        plot_tms_vectors(weight, V, U, firing=firing[:2])
