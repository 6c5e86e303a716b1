"""What a target on sparse features is trained to say: callables from inputs to labels."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pdlightning.functional.random import key_generator


class AbsoluteLabels:
    """label = |x|: the labels of the toy models of superposition."""

    def __call__(self, x: Float[Tensor, "batch n_features"]) -> Float[Tensor, "batch n_features"]:
        return x.abs()


class ResidualActivationLabels:
    """label_i = x_i + act(c_i * x_i): the labels of the residual MLP.

    Args:
        n_features: length of x.
        activation: act.
        coefficient_range: bounds (low, high) of c_i ~ U[low, high]; (1, 1) makes every c_i exactly 1.
        seed: key of the c_i.
    """

    def __init__(
        self,
        *,
        n_features: int,
        activation: Literal["relu", "gelu"],
        coefficient_range: tuple[float, float],
        seed: int,
    ) -> None:
        low, high = coefficient_range
        if low > high:
            raise ValueError(f"coefficient_range must be (low, high) with low <= high, got {(low, high)}.")
        if activation not in ("relu", "gelu"):
            raise ValueError(f"activation must be relu or gelu, got {activation!r}.")
        self.activation = torch.relu if activation == "relu" else torch.nn.functional.gelu
        uniform = torch.rand(n_features, generator=key_generator(seed, "labels", "coefficients"))
        self.coefficients = low + (high - low) * uniform

    def __call__(self, x: Float[Tensor, "batch n_features"]) -> Float[Tensor, "batch n_features"]:
        if x.device != self.coefficients.device:
            self.coefficients = self.coefficients.to(x.device)
        return x + self.activation(self.coefficients * x)
