"""Figures of a target before it is decomposed: what it represents and how.

The functions `*_figures(model, data)` give all figures of a kind of target by name, for the folder of a stored target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from pdlightning.figures.neurons import neuron_contributions
from pdlightning.figures.style import (
    ACCENT,
    INK,
    QUIET,
    WEIGHT_COLOURS,
    colour_bar,
    count_axis,
    drawable,
    heat_map,
    name_panel,
    panels,
    symmetric_limits,
)

if TYPE_CHECKING:
    from pdlightning.data import InductionTokens, SparseFeatures
    from pdlightning.targets import TMS, InductionTransformer, ResidMLP


def plot_tms_polygon(weight: Float[Tensor, "2 n_features"]) -> Figure:
    """Each feature's direction in a hidden space of two dimensions: the columns of linear1's weight.

    Raises ValueError for another number of hidden dimensions.
    """
    columns = drawable(weight, what="weight", shape=(2, None))
    figure, (ax,) = panels(1, title="Feature directions in the hidden space", width=4.2, height=3.8)
    reach = 1.3 * float(abs(columns).max() or 1.0)
    ax.axhline(0, color=QUIET, lw=0.5)
    ax.axvline(0, color=QUIET, lw=0.5)
    for i, (x, y) in enumerate(columns.T):
        ax.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": ACCENT, "lw": 1.2, "shrinkB": 0})
        ax.text(1.14 * x, 1.14 * y, str(i), ha="center", va="center", fontsize=8, color=INK)
    ax.scatter(columns[0], columns[1], s=8, color=ACCENT)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    ax.set(xlabel="hidden dimension 0", ylabel="hidden dimension 1")
    return figure


def plot_feature_response(
    *,
    response: Float[Tensor, "n_features n_features"],
    inputs: Float[Tensor, " n_inputs"],
    own: Float[Tensor, "n_inputs n_features"],
    labels: Float[Tensor, "n_inputs n_features"],
) -> Figure:
    """What a target on sparse features says when one feature is active.

    Args:
        response: row i is the output when feature i alone is 1.
        inputs: values of the one active feature, ascending.
        own: column i is output i when feature i alone has each of these values.
        labels: the labels of `own`.
    """
    matrix = drawable(response, what="response", shape=(None, response.shape[-1]))
    figure, axes = panels(2, title="Response to one active feature", width=4.2, height=3.4)
    image = heat_map(axes[0], matrix, limits=symmetric_limits(matrix), colours=WEIGHT_COLOURS)
    name_panel(axes[0], "feature i alone at 1")
    axes[0].set(xlabel="output", ylabel="active feature i", aspect="equal")
    colour_bar(figure, image, axes[0], label="output")
    values = drawable(inputs, what="inputs", shape=(None,))
    ends = (values.size, matrix.shape[0])
    outputs, wanted = drawable(own, what="own", shape=ends), drawable(labels, what="labels", shape=ends)
    axes[1].plot(values, outputs, color=ACCENT, lw=0.8, alpha=max(0.15, min(1.0, 8 / ends[1])))
    axes[1].plot(values, wanted.min(axis=1), color=INK, lw=1, ls="--")
    if (wanted.min(axis=1) != wanted.max(axis=1)).any():
        axes[1].plot(values, wanted.max(axis=1), color=INK, lw=1, ls="--")
    name_panel(axes[1], "output i for each feature i; dashed: the label (its range)")
    axes[1].set(xlabel="value of the active feature", ylabel="its own output")
    return figure


def plot_neuron_contributions(contributions: Sequence[Float[Tensor, "n_features d_mlp"]]) -> Figure:
    """How strongly each neuron carries each input feature to its own output, one panel per MLP layer.

    `contributions[l][i, n]` is (W_E[i] . W_in[n]) (W_out[:, n] . W_U[:, i]), the slope that neuron n of layer l adds to
    output i while it is active (`pdlightning.figures.neurons.neuron_contributions`).
    """
    n_features = contributions[0].shape[0]
    layers = [drawable(c, what=f"layer {i}", shape=(n_features, None)) for i, c in enumerate(contributions)]
    figure, axes = panels(
        2 * len(layers),
        title="Contribution of each neuron to each feature's own output",
        width=4.2,
        height=3.0,
        columns=2,
    )
    top = max(float(layer.max()) for layer in layers)
    for i, layer in enumerate(layers):
        dots, map_ = axes[2 * i], axes[2 * i + 1]
        for neuron in layer.T:
            dots.scatter(range(n_features), neuron, s=5, lw=0, color=ACCENT, alpha=0.5)
        dots.axhline(0, color=QUIET, lw=0.5)
        name_panel(dots, f"layer {i}: one point per neuron")
        dots.set(xlabel="input feature", ylabel="slope", ylim=(None, 1.08 * top))
        count_axis(dots, "x")
        image = heat_map(map_, layer.T, limits=(-top, top), colours=WEIGHT_COLOURS)
        name_panel(map_, f"layer {i}")
        map_.set(xlabel="input feature", ylabel="neuron")
        colour_bar(figure, image, map_, label="slope")
    return figure


def plot_attention(patterns: Sequence[Float[Tensor, "head query key"]], *, title: str) -> Figure:
    """Attention probabilities on one sequence, one panel per layer and head."""
    named = [
        (f"layer {i}, head {h}", drawable(head, what=f"layer {i}, head {h}", shape=(None, None)))
        for i, layer in enumerate(patterns)
        for h, head in enumerate(layer)
    ]
    figure, axes = panels(len(named), title=title, width=3.8, height=3.2)
    image = None
    for ax, (name, pattern) in zip(axes, named, strict=True):
        image = heat_map(ax, pattern, limits=(0.0, 1.0), colours="magma_r")
        name_panel(ax, name)
        ax.set(xlabel="key position", ylabel="query position", aspect="equal")
    colour_bar(figure, image, axes, label="attention probability")
    return figure


@torch.no_grad()
def single_feature_figure(model: TMS | ResidMLP, data: SparseFeatures) -> Figure:
    """`plot_feature_response` of a model over the value range of its data."""
    assert data.labels is not None
    eye = torch.eye(data.n_features)
    inputs = torch.linspace(data.low, data.high, 41)
    alone = inputs[:, None, None] * eye
    own, labels = (y.diagonal(dim1=-2, dim2=-1) for y in (model(alone), data.labels(alone)))
    return plot_feature_response(response=model(eye), inputs=inputs, own=own, labels=labels)


def tms_figures(model: TMS, data: SparseFeatures) -> dict[str, Figure]:
    figures = {"feature_response": single_feature_figure(model, data)}
    if model.linear1.out_features == 2:
        figures["polygon"] = plot_tms_polygon(model.linear1.weight)
    return figures


def resid_mlp_figures(model: ResidMLP, data: SparseFeatures) -> dict[str, Figure]:
    weights = dict(model.named_parameters())
    contributions = [
        neuron_contributions(
            embedding=model.W_E,
            mlp_in=weights[f"layers.{i}.mlp_in.weight"],
            mlp_out=weights[f"layers.{i}.mlp_out.weight"],
            unembedding=model.W_U,
        )
        for i in range(len(model.layers))
    ]
    return {
        "feature_response": single_feature_figure(model, data),
        "neuron_contributions": plot_neuron_contributions(contributions),
    }


@torch.no_grad()
def induction_figures(model: InductionTransformer, data: InductionTokens) -> dict[str, Figure]:
    tokens, _ = data.batch(0, "eval")
    first = int((tokens[0] == data.special).nonzero()[0])
    patterns = [layer[0] for layer in model.attention_patterns(tokens[:1])]
    return {"attention": plot_attention(patterns, title=f"Attention, one sequence with its first S at {first}")}
