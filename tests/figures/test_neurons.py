from __future__ import annotations

import numpy as np
import pytest
import torch

from pdlightning.figures import plot_neuron_contributions_by_subcomponent


def draws(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(n_features: int, d: int, d_mlp: int, C: int, layers: int) -> dict:
    return {
        "embedding": draws(n_features, d, seed=0),
        "unembedding": draws(d, n_features, seed=1),
        "mlp_in": [draws(d_mlp, d, seed=10 + i) for i in range(layers)],
        "mlp_out": [draws(d, d_mlp, seed=20 + i) for i in range(layers)],
        "V": [draws(d, C, seed=30 + i) for i in range(layers)],
        "U": [draws(C, d_mlp, seed=40 + i) for i in range(layers)],
        "ci": [draws(n_features, C, seed=50 + i).clamp(0, 1) for i in range(layers)],
    }


@pytest.mark.parametrize(("n_features", "C", "layers"), [(1, 1, 1), (3, 5, 2), (20, 500, 1)])
def test_points_are_the_contributions_written_out(n_features: int, C: int, layers: int) -> None:
    x = inputs(n_features, 6, 4, C, layers)
    target_panel, parts_panel, both_panel = plot_neuron_contributions_by_subcomponent(**x).axes[:3]
    target, parts = [], []
    for i in range(n_features):
        for layer in range(layers):
            subcomponents = (x["V"][layer] * x["ci"][layer][i]) @ x["U"][layer]
            for n in range(4):
                out = x["mlp_out"][layer][:, n] @ x["unembedding"][:, i]
                target.append(float(x["embedding"][i] @ x["mlp_in"][layer][n] * out))
                parts.append(float(x["embedding"][i] @ subcomponents[:, n] * out))
    features = np.repeat(np.arange(n_features), 4 * layers)
    for panel, values in ((target_panel, target), (parts_panel, parts)):
        points = np.asarray(panel.collections[0].get_offsets())
        np.testing.assert_array_equal(points[:, 0], features)
        np.testing.assert_allclose(points[:, 1], values, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.asarray(both_panel.collections[0].get_offsets())[:, 0], target, rtol=1e-3, atol=1e-3)


def test_a_perfect_decomposition_lies_on_the_diagonal() -> None:
    x = inputs(5, 6, 4, 6, 1)
    x["V"], x["U"], x["ci"] = [torch.eye(6)], [x["mlp_in"][0].T], [torch.ones(5, 6)]
    figure = plot_neuron_contributions_by_subcomponent(**x)
    points = np.asarray(figure.axes[2].collections[0].get_offsets())
    np.testing.assert_allclose(points[:, 0], points[:, 1], rtol=1e-5)
    figure.canvas.draw()


def test_bad_inputs_name_the_layer() -> None:
    x = inputs(3, 6, 4, 5, 2)
    with pytest.raises(ValueError, match="V of layer 1: 30 of 30 values are not finite"):
        plot_neuron_contributions_by_subcomponent(**{**x, "V": [x["V"][0], x["V"][1] * torch.nan]})
    with pytest.raises(ValueError, match=r"mlp_out of layer 0: expected a tensor of shape \(6, 4\), got \(4, 6\)"):
        plot_neuron_contributions_by_subcomponent(**{**x, "mlp_out": [w.T for w in x["mlp_out"]]})
    with pytest.raises(ValueError, match=r"one entry per layer, got lengths \[1, 2\]"):
        plot_neuron_contributions_by_subcomponent(**{**x, "ci": x["ci"][:1]})
