import numpy as np
import pytest
import torch

from pdlightning.data import AbsoluteLabels, InductionTokens, ResidualActivationLabels, SparseFeatures
from pdlightning.figures.targets import (
    induction_figures,
    plot_attention,
    plot_feature_response,
    plot_neuron_contributions,
    plot_tms_polygon,
    resid_mlp_figures,
    single_feature_figure,
    tms_figures,
)
from pdlightning.targets import TMS, InductionTransformer, ResidMLP


def features(n_features, labels):
    return SparseFeatures(
        n_features=n_features,
        batch_size=8,
        eval_batches=1,
        seed=0,
        generation="at_least_zero",
        probability=0.5,
        value_range=(-1.0, 1.0),
        labels=labels,
    )


def test_polygon_shows_the_columns_of_the_weight_with_their_numbers():
    weight = torch.tensor([[1.0, 0.0, -0.5], [0.0, 2.0, 0.5]])
    (ax,) = plot_tms_polygon(weight).axes
    np.testing.assert_allclose(ax.collections[0].get_offsets(), weight.T)
    assert [text.get_text() for text in ax.texts if text.get_text()] == ["0", "1", "2"]


def test_polygon_needs_two_hidden_dimensions():
    with pytest.raises(ValueError, match=r"weight: expected .*\(2, 'any'\), got \(3, 4\)"):
        plot_tms_polygon(torch.zeros(3, 4))


def test_response_shows_the_outputs_and_each_features_own_curve_beside_its_label():
    labels = ResidualActivationLabels(n_features=4, activation="relu", coefficient_range=(1.0, 2.0), seed=0)
    gain = torch.tensor([1.0, 2.0, 3.0, 4.0])
    figure = single_feature_figure(lambda x: x * gain + 0.1, features(4, labels))
    matrix, curves = figure.axes[0].images[0].get_array(), figure.axes[1].lines
    np.testing.assert_allclose(matrix, torch.diag(gain) + 0.1)
    inputs = torch.linspace(-1, 1, 41)
    for i in range(4):
        np.testing.assert_allclose(curves[i].get_ydata(), inputs * gain[i] + 0.1, rtol=1e-6)
    wanted = torch.stack([labels(v * torch.eye(4)).diagonal() for v in inputs])
    np.testing.assert_allclose(curves[4].get_ydata(), wanted.amin(1))
    np.testing.assert_allclose(curves[5].get_ydata(), wanted.amax(1))


def test_response_refuses_what_it_cannot_draw():
    inputs, values = torch.linspace(0, 1, 3), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="own: 1 of 6 values are not finite"):
        bad = values.clone()
        bad[0, 0] = torch.nan
        plot_feature_response(response=torch.eye(2), inputs=inputs, own=bad, labels=values)


def test_neuron_contributions_are_drawn_layer_by_layer():
    layers = [torch.arange(6.0).reshape(3, 2), -torch.ones(3, 4)]
    axes = plot_neuron_contributions(layers).axes
    np.testing.assert_allclose(axes[1].images[0].get_array(), layers[0].T)
    np.testing.assert_allclose(axes[3].images[0].get_array(), layers[1].T)
    np.testing.assert_allclose(axes[0].collections[1].get_offsets()[:, 1], layers[0][:, 1])


def test_attention_has_one_panel_per_layer_and_head():
    patterns = [torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    axes = plot_attention(patterns, title="t").axes
    np.testing.assert_allclose(axes[2].images[0].get_array(), patterns[1][0])
    assert axes[3].get_title(loc="left") == "layer 1, head 1"


def test_every_kind_of_target_has_its_figures():
    labels = ResidualActivationLabels(n_features=6, activation="relu", coefficient_range=(1.0, 1.0), seed=0)
    resid_mlp = ResidMLP(
        n_features=6,
        d_embed=8,
        d_mlp=3,
        n_layers=2,
        embedding="fixed_random",
        activation="relu",
        in_bias=False,
        out_bias=False,
        seed=0,
    )
    figures = resid_mlp_figures(resid_mlp, features(6, labels))
    assert set(figures) == {"feature_response", "neuron_contributions"}
    contributions = figures["neuron_contributions"].axes[3].images[0].get_array()
    alone = resid_mlp.W_E @ resid_mlp.layers[1].mlp_in.weight.T
    np.testing.assert_allclose(
        contributions[2, 4], alone[4, 2].item() * (resid_mlp.W_E @ resid_mlp.layers[1].mlp_out.weight)[4, 2].item()
    )
    flat = TMS(n_features=5, n_hidden=2, tied=True, seed=0)
    deep = TMS(n_features=5, n_hidden=3, tied=True, seed=0)
    assert set(tms_figures(flat, features(5, AbsoluteLabels()))) == {"feature_response", "polygon"}
    assert set(tms_figures(deep, features(5, AbsoluteLabels()))) == {"feature_response"}
    transformer = InductionTransformer(vocab=8, length=10, d_model=4, n_layers=2, n_heads=1, seed=0)
    tokens = InductionTokens(vocab=8, length=10, prefix_window=3, batch_size=2, eval_batches=1, seed=0)
    assert set(induction_figures(transformer, tokens)) == {"attention"}
