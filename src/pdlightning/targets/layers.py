"""Linear layers whose first weights come from a generator of one's own."""

from __future__ import annotations

import torch
from torch import nn


def normal_linear(d_in: int, d_out: int, *, bias: bool, std: float, generator: torch.Generator) -> nn.Linear:
    """`nn.Linear` with weights ~ N(0, std) and biases 0; its own initialisation would use the global generator."""
    layer = nn.Linear(d_in, d_out, bias=bias, device="meta").to_empty(device="cpu")
    nn.init.normal_(layer.weight, std=std, generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
