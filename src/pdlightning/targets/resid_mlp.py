"""A residual stream with MLP blocks that compute more activations than they have neurons (spec 9)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pdlightning.functional.random import key_generator
from pdlightning.targets.layers import normal_linear


class MLPBlock(nn.Module):
    """mlp_out(act(mlp_in(r))), the addition to the residual stream."""

    def __init__(self, *, mlp_in: nn.Linear, mlp_out: nn.Linear, activation: Literal["relu", "gelu"]) -> None:
        super().__init__()
        self.mlp_in = mlp_in
        self.mlp_out = mlp_out
        self.activation = nn.ReLU() if activation == "relu" else nn.GELU()

    def forward(self, r: Float[Tensor, "*leading d_embed"]) -> Float[Tensor, "*leading d_embed"]:
        return self.mlp_out(self.activation(self.mlp_in(r)))


class ResidMLP(nn.Module):
    """r = x W_E; r += mlp_out(act(mlp_in(r))) for every layer; y = r W_U.

    `W_E` is (n_features, d_embed), `W_U` (d_embed, n_features).

    Args:
        n_features: length of x and y.
        d_embed: width of the residual stream.
        d_mlp: neurons of ONE layer.
        n_layers: number of MLP layers.
        embedding: `fixed_random` draws rows of unit norm, `fixed_identity` needs d_embed == n_features; both are
            never trained and have W_U = W_E^T. `learned` trains W_E and W_U, each its own.
        activation: act.
        in_bias, out_bias: whether mlp_in and mlp_out have biases (initially 0).
        seed: key of the initial weights.
    """

    def __init__(
        self,
        *,
        n_features: int,
        d_embed: int,
        d_mlp: int,
        n_layers: int,
        embedding: Literal["fixed_random", "fixed_identity", "learned"],
        activation: Literal["relu", "gelu"],
        in_bias: bool,
        out_bias: bool,
        seed: int,
    ) -> None:
        super().__init__()
        for name, value in zip(
            ("n_features", "d_embed", "d_mlp", "n_layers"), (n_features, d_embed, d_mlp, n_layers), strict=True
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if activation not in ("relu", "gelu"):
            raise ValueError(f"activation must be relu or gelu, got {activation!r}.")
        self.W_E = nn.Parameter(initial_embedding(embedding, n_features, d_embed, seed), embedding == "learned")
        self.trained_W_U = nn.Parameter(self.W_E.detach().T.clone()) if embedding == "learned" else None

        def linear(d_in: int, d_out: int, layer: int, name: str, bias: bool) -> nn.Linear:
            generator = key_generator(seed, "layers", str(layer), name)
            return normal_linear(d_in, d_out, bias=bias, std=d_in**-0.5, generator=generator)

        self.layers = nn.ModuleList(
            MLPBlock(
                mlp_in=linear(d_embed, d_mlp, i, "mlp_in", in_bias),
                mlp_out=linear(d_mlp, d_embed, i, "mlp_out", out_bias),
                activation=activation,
            )
            for i in range(n_layers)
        )

    @property
    def W_U(self) -> Float[Tensor, "d_embed n_features"]:
        return self.W_E.T if self.trained_W_U is None else self.trained_W_U

    def forward(self, x: Float[Tensor, "*leading n_features"]) -> Float[Tensor, "*leading n_features"]:
        r = x @ self.W_E
        for layer in self.layers:
            r = r + layer(r)
        return r @ self.W_U


def initial_embedding(
    kind: Literal["fixed_random", "fixed_identity", "learned"], n_features: int, d_embed: int, seed: int
) -> Float[Tensor, "n_features d_embed"]:
    """Rows of unit norm in random directions, or the identity."""
    if kind not in ("fixed_random", "fixed_identity", "learned"):
        raise ValueError(f"embedding must be fixed_random, fixed_identity or learned, got {kind!r}.")
    if kind != "fixed_identity":
        rows = torch.randn(n_features, d_embed, generator=key_generator(seed, "W_E"))
        return nn.functional.normalize(rows, dim=-1)
    if d_embed != n_features:
        raise ValueError(f"embedding fixed_identity needs d_embed == n_features, got {d_embed} and {n_features}.")
    return torch.eye(n_features)
