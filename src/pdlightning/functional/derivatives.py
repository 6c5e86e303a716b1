"""What the hand-written backwards share."""

from __future__ import annotations

import torch
from torch import Tensor

LARGE = 2**20
"""Numbers: 4 MB in float32."""


def large(x: Tensor) -> bool:
    """Whether a backward should compute again what is as large as x, rather than keep it. It would slow a toy down."""
    return x.numel() >= LARGE


def refuse_second_derivative(what: str) -> None:
    """For a backward without a derivative of its own: in it, grad is enabled only for `create_graph`."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} has a first derivative only: call backward or autograd.grad without create_graph.")
