"""The ci functions that are MLPs (spec I2): GELU between layers, none after the last."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pdlightning.modules.ci import CIFunction, CIShape, check_hidden, initial_weight, site_key


class MLP(nn.Module):
    """Linear layers of the given widths with GELU between them."""

    def __init__(self, *, widths: list[int], seed: int, name: str):
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        self.weights = nn.ParameterList(
            initial_weight(d_out, d_in, fan_in=d_in, last=i == len(pairs) - 1, seed=seed, name=(name, str(i)))
            for i, (d_in, d_out) in enumerate(pairs)
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(d_out)) for _, d_out in pairs)

    def forward(self, x: Float[Tensor, "*leading d_in"]) -> Float[Tensor, "*leading d_out"]:
        *hidden, last = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            x = F.gelu(F.linear(x, weight, bias))
        return F.linear(x, *last)


class PerSubcomponentMLP(nn.Module):
    """C independent MLPs to one logit each, weights `[C, d_in, d_out]`.

    They read either one number each, `[*leading, C]` (`shared_input=False`), or all the same x, `[*leading, d_in]`.
    """

    def __init__(self, *, C: int, d_in: int, hidden: list[int], shared_input: bool, seed: int, name: str):
        super().__init__()
        widths = [d_in, *hidden, 1]
        self.shared_input = shared_input
        self.weights = nn.ParameterList(
            initial_weight(C, a, b, fan_in=a, last=i == len(hidden), seed=seed, name=(name, str(i)))
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(C, b)) for b in widths[1:])

    def forward(self, x: Float[Tensor, "*leading d"]) -> Float[Tensor, "*leading C"]:
        w, b = list(self.weights), list(self.biases)
        if not self.shared_input and len(w) == 2:
            # Nothing of size [batch, C, hidden] beyond what GELU needs: these are the costliest tensors of toy recipes.
            h = F.gelu(torch.addcmul(b[0], x.unsqueeze(-1), w[0].squeeze(1)))
            return (h * w[1].squeeze(2)).sum(-1) + b[1].squeeze(1)
        if self.shared_input:
            h = torch.einsum("...i,cih->...ch", x, w[0]) + b[0]
        else:
            h = x.unsqueeze(-1) * w[0].squeeze(1) + b[0]
        for weight, bias in zip(w[1:], b[1:], strict=True):
            h = torch.einsum("...ch,chk->...ck", F.gelu(h), weight) + bias
        return h.squeeze(-1)


class _PerSiteCI(CIFunction):
    """One network for each site."""

    def __init__(self, *, hidden: list[int]):
        super().__init__()
        self.hidden = check_hidden(hidden, type(self).__name__)
        self.networks = nn.ModuleDict()

    def network(self, shape: CIShape, *, seed: int, name: str) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} must return the network of one site from network(shape).")

    def build(self, shapes: Mapping[str, CIShape], *, seed: int) -> None:
        for path, shape in shapes.items():
            self.networks[site_key(path)] = self.network(shape, seed=seed, name=path)

    def forward(self, inputs: dict[str, Float[Tensor, "*leading d"]]) -> dict[str, Float[Tensor, "*leading C"]]:
        return {path: self.networks[site_key(path)](x) for path, x in inputs.items()}


class ScalarMLP(_PerSiteCI):
    """`scalar_mlp`: subcomponent c has its own MLP of its own activation (x V)_c (spec I2)."""

    reads = "component"

    def network(self, shape: CIShape, *, seed: int, name: str) -> nn.Module:
        return PerSubcomponentMLP(C=shape.C, d_in=1, hidden=self.hidden, shared_input=False, seed=seed, name=name)


class VectorMLP(_PerSiteCI):
    """`vector_mlp`: subcomponent c has its own MLP of the site's input x (spec I2)."""

    def network(self, shape: CIShape, *, seed: int, name: str) -> nn.Module:
        return PerSubcomponentMLP(
            C=shape.C, d_in=shape.d_in, hidden=self.hidden, shared_input=True, seed=seed, name=name
        )


class SharedMLP(_PerSiteCI):
    """`shared_mlp`: one MLP x -> C for each site (spec I2)."""

    def network(self, shape: CIShape, *, seed: int, name: str) -> nn.Module:
        return MLP(widths=[shape.d_in, *self.hidden, shape.C], seed=seed, name=name)


class GlobalMLP(CIFunction):
    """`global_mlp`: the inputs of all sites concatenated -> one MLP -> split into the sites' logits (spec I2)."""

    def __init__(self, *, hidden: list[int]):
        super().__init__()
        self.hidden = check_hidden(hidden, "GlobalMLP")

    def build(self, shapes: Mapping[str, CIShape], *, seed: int) -> None:
        self.splits = [shape.C for shape in shapes.values()]
        d_in = sum(shape.d_in for shape in shapes.values())
        self.network = MLP(widths=[d_in, *self.hidden, sum(self.splits)], seed=seed, name="global")

    def forward(self, inputs: dict[str, Float[Tensor, "*leading d"]]) -> dict[str, Float[Tensor, "*leading C"]]:
        logits = self.network(torch.cat(list(inputs.values()), dim=-1))
        return dict(zip(inputs, logits.split(self.splits, dim=-1), strict=True))
