"""Toy models of superposition: more features than dimensions (Elhage et al. 2022; spec 9)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pdlightning.functional.random import key_generator
from pdlightning.targets.layers import normal_linear


class TransposedLinear(nn.Linear):
    """A linear layer whose weight is another layer's, transposed, at every moment; only the bias is its own.

    The weight is read when used and is no parameter here, so training, copying and moving the other layer just work,
    and either layer may be replaced in its module tree without the other noticing.
    """

    def __init__(self, other: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = other.out_features, other.in_features
        self.bias = nn.Parameter(torch.zeros(self.out_features))
        # Inside a tuple, the other layer is not registered as a child of this one.
        self.other = (other,)

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.other[0].weight.T


class TMS(nn.Module):
    """y = ReLU(linear2(hidden_layers(linear1(x)))).

    Args:
        n_features: length of x and y.
        n_hidden: dimensions that the features share.
        n_hidden_layers: linear layers (n_hidden, n_hidden) without bias between linear1 and linear2.
        hidden_layers_init: `identity` layers stay the identity, they are never trained; `random` layers are trained.
        tied: linear2.weight is linear1.weight transposed, throughout training.
        seed: key of the initial weights.
    """

    def __init__(
        self,
        *,
        n_features: int,
        n_hidden: int,
        n_hidden_layers: int = 0,
        hidden_layers_init: Literal["identity", "random"] = "identity",
        tied: bool,
        seed: int,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("n_features", n_features, 1),
            ("n_hidden", n_hidden, 1),
            ("n_hidden_layers", n_hidden_layers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if hidden_layers_init not in ("identity", "random"):
            raise ValueError(f"hidden_layers_init must be identity or random, got {hidden_layers_init!r}.")

        def linear(d_in: int, d_out: int, *name: str, bias: bool = False) -> nn.Linear:
            xavier = (2 / (d_in + d_out)) ** 0.5
            return normal_linear(d_in, d_out, bias=bias, std=xavier, generator=key_generator(seed, *name))

        self.linear1 = linear(n_features, n_hidden, "linear1")
        self.hidden_layers = nn.ModuleList(
            linear(n_hidden, n_hidden, "hidden_layers", str(i)) for i in range(n_hidden_layers)
        )
        if hidden_layers_init == "identity":
            for layer in self.hidden_layers.parameters():
                nn.init.eye_(layer).requires_grad_(False)
        self.linear2 = TransposedLinear(self.linear1) if tied else linear(n_hidden, n_features, "linear2", bias=True)

    def forward(self, x: Float[Tensor, "*leading n_features"]) -> Float[Tensor, "*leading n_features"]:
        h = self.linear1(x)
        for layer in self.hidden_layers:
            h = layer(h)
        return torch.relu(self.linear2(h))
