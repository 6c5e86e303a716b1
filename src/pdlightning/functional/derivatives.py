"""What the hand-written backwards share."""

from __future__ import annotations

import torch


def refuse_second_derivative(what: str) -> None:
    """For a backward without a derivative of its own: in it, grad is enabled only for `create_graph`."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} has a first derivative only: call backward or autograd.grad without create_graph.")
