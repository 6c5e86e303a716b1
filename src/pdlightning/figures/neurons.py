"""Figure of what each neuron of a residual MLP does for each input feature, in the target and in its subcomponents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pdlightning.figures.style import INK, colour_bar, count_axis, drawable, name_panel, panels, symmetric_limits


def neuron_contributions(
    *,
    embedding: Float[Tensor, "n_features d"],
    mlp_in: Float[Tensor, "d_mlp d"],
    mlp_out: Float[Tensor, "d d_mlp"],
    unembedding: Float[Tensor, "d n_features"],
) -> Float[Tensor, "n_features d_mlp"]:
    """(W_E[i] . W_in[n]) * (W_out[:, n] . W_U[:, i]): how strongly neuron n carries feature i to its own output."""
    return (embedding @ mlp_in.T) * (mlp_out.T @ unembedding).T


def subcomponent_contributions(
    *,
    embedding: Float[Tensor, "n_features d"],
    V: Float[Tensor, "d C"],
    U: Float[Tensor, "C d_mlp"],
    ci: Float[Tensor, "n_features C"],
    mlp_out: Float[Tensor, "d d_mlp"],
    unembedding: Float[Tensor, "d n_features"],
) -> Float[Tensor, "n_features d_mlp"]:
    """`neuron_contributions` with sum_c ci[i, c] (W_E[i] . V[:, c]) U[c, n] in the place of W_E[i] . W_in[n]."""
    return ((embedding @ V) * ci) @ U * (mlp_out.T @ unembedding).T


def plot_neuron_contributions_by_subcomponent(
    *,
    embedding: Float[Tensor, "n_features d"],
    unembedding: Float[Tensor, "d n_features"],
    mlp_in: Sequence[Float[Tensor, "d_mlp d"]],
    mlp_out: Sequence[Float[Tensor, "d d_mlp"]],
    V: Sequence[Float[Tensor, "d C"]],
    U: Sequence[Float[Tensor, "C d_mlp"]],
    ci: Sequence[Float[Tensor, "n_features C"]],
) -> Figure:
    """What every neuron contributes to every feature's own output: target, subcomponents, and one against the other.

    The sequences have one entry per layer; neurons are numbered across layers. `V`, `U` are those of mlp_in, and `ci`
    is that of the single-feature probe (spec E3), so the second panel shows what the subcomponents that are important
    for a feature do for it. Points on the diagonal of the third panel are neurons that the decomposition gets right.
    Raises ValueError where the layers or shapes disagree or a value is not finite, naming the layer.
    """
    lengths = {len(mlp_in), len(mlp_out), len(V), len(U), len(ci)}
    if len(lengths) != 1 or not mlp_in:
        raise ValueError(f"mlp_in, mlp_out, V, U and ci must have one entry per layer, got lengths {sorted(lengths)}.")
    n_features, d = drawable(embedding, what="embedding", shape=(None, None)).shape
    drawable(unembedding, what="unembedding", shape=(d, n_features))
    target, parts = [], []
    for layer, (w_in, w_out, v, u, importance) in enumerate(zip(mlp_in, mlp_out, V, U, ci, strict=True)):
        d_mlp = drawable(w_in, what=f"mlp_in of layer {layer}", shape=(None, d)).shape[0]
        C = drawable(v, what=f"V of layer {layer}", shape=(d, None)).shape[1]
        drawable(w_out, what=f"mlp_out of layer {layer}", shape=(d, d_mlp))
        drawable(u, what=f"U of layer {layer}", shape=(C, d_mlp))
        drawable(importance, what=f"ci of layer {layer}", shape=(n_features, C))
        ends = {"embedding": embedding, "unembedding": unembedding, "mlp_out": w_out}
        target.append(neuron_contributions(mlp_in=w_in, **ends))
        parts.append(subcomponent_contributions(V=v, U=u, ci=importance, **ends))
    return draw(torch.cat(target, dim=1), torch.cat(parts, dim=1))


def draw(target: Float[Tensor, "n_features neurons"], parts: Float[Tensor, "n_features neurons"]) -> Figure:
    truth = drawable(target, what="contributions of the target", shape=(None, None))
    found = drawable(parts, what="contributions of the subcomponents", shape=(None, None))
    features = torch.arange(target.shape[0]).repeat_interleave(target.shape[1]).numpy()
    neurons = torch.arange(target.shape[1]).repeat(target.shape[0]).numpy()
    figure, axes = panels(3, title="Contribution of each neuron to each input feature", width=4.0, height=3.4)
    size = 9 if truth.size > 500 else 20
    style = {"c": neurons, "cmap": "viridis", "s": size, "lw": 0, "alpha": 0.8, "rasterized": True}
    high = 1.08 * max(symmetric_limits(truth)[1], symmetric_limits(found)[1])
    low = min(1.08 * float(min(truth.min(), found.min())), -0.05 * high)
    for ax, values, name in ((axes[0], truth, "target"), (axes[1], found, "subcomponents, weighted by ci")):
        count_axis(ax, "x")
        ax.axhline(0, color=INK, lw=0.5)
        ax.scatter(features, values.ravel(), **style)
        name_panel(ax, name)
        ax.set(xlabel="input feature", ylabel="contribution to the feature's own output", ylim=(low, high))
    axes[2].plot([low, high], [low, high], color=INK, lw=0.5)
    drawn = axes[2].scatter(truth.ravel(), found.ravel(), **style)
    name_panel(axes[2], "one point per feature and neuron")
    axes[2].set(xlabel="target", ylabel="subcomponents", xlim=(low, high), ylim=(low, high), aspect="equal")
    bar = colour_bar(figure, drawn, axes, label="neuron")
    bar.locator = MaxNLocator(integer=True, min_n_ticks=1)
    bar.update_ticks()
    return figure
