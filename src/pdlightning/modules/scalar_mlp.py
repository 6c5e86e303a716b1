"""C independent MLPs of one number, one hidden layer: `[batch, C, hidden]`, the costliest tensors of toy recipes."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def scalar_mlp_hidden(
    x: Float[Tensor, "*leading C"],
    w_in: Float[Tensor, "C hidden"],
    b_in: Float[Tensor, "C hidden"],
    w_out: Float[Tensor, "C hidden"],
    b_out: Float[Tensor, " C"],
) -> Float[Tensor, "*leading C"]:
    """sum_h gelu(x_c * w_in_ch + b_in_ch) * w_out_ch + b_out_c."""
    return (F.gelu(x.unsqueeze(-1) * w_in + b_in) * w_out).sum(-1) + b_out
