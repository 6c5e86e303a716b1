"""A site: one decomposed weight matrix, standing in the place of the target's module (spec 2)."""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pdlightning.functional.components import masked_product
from pdlightning.functional.random import key_generator
from pdlightning.modules.passes import CurrentPass, Products

SiteKind = Literal["linear", "conv1d", "embedding", "identity"]
PRE_IDENTITY = ".pre_identity"
SUPPORTED = (
    "nn.Linear, transformers' Conv1D, nn.Embedding, each with the forward of its class, or `<path>.pre_identity` in"
    " front of a module"
)


def site_kind(module: nn.Module) -> SiteKind | None:
    """The kind of site a module makes, or None where it cannot be decomposed (spec C1).

    A subclass with a forward of its own is None: an embedding that scales what it looks up, a quantized matrix. Its
    weight does not say what it computes.
    """
    kinds: dict[type[nn.Module], SiteKind] = {nn.Linear: "linear", nn.Embedding: "embedding"}
    transformers = sys.modules.get("transformers.pytorch_utils")  # a Conv1D cannot exist before it is imported
    if transformers is not None:
        kinds[transformers.Conv1D] = "conv1d"
    for cls, kind in kinds.items():
        if isinstance(module, cls):
            return kind if type(module).forward is cls.forward else None
    return None


class Components(nn.Module):
    """The subcomponents of one site: V (d_in, C) meets the input, U (C, d_out) makes the output.

    V ~ N(0, 1/sqrt(d_in)), U ~ N(0, 1/sqrt(C)), standard deviations, drawn by the key (seed, path) (spec C3).
    V and U are float32 at the least: in the bfloat16 of a target most of their updates would be lost. The output
    has the dtype of the target.
    `target_weight` is the frozen matrix in nn.Linear's (d_out, d_in) layout, `target_bias` its bias or None.
    """

    def __init__(self, *, path: str, kind: SiteKind, module: nn.Module, C: int, seed: int, width: int = 0):
        super().__init__()
        self.path, self.kind, self.C = path, kind, C
        self._frozen = (module,)  # in a tuple, so that the target's parameters never become ours
        self._width = width
        self.d_out, self.d_in = (width, width) if kind == "identity" else tuple(self.target_weight.shape)
        like = next(module.parameters(), None) if kind == "identity" else self.target_weight
        generator = key_generator(seed, "init", path)
        self.V = nn.Parameter(_normal(self.d_in, C, std=self.d_in**-0.5, like=like, generator=generator))
        self.U = nn.Parameter(_normal(C, self.d_out, std=C**-0.5, like=like, generator=generator))

    @property
    def target_weight(self) -> Float[Tensor, "d_out d_in"]:
        if self.kind == "identity":
            return torch.eye(self._width, dtype=self.V.dtype, device=self.V.device)
        weight = self._frozen[0].weight
        assert isinstance(weight, Tensor)
        return (weight if self.kind == "linear" else weight.T).detach()

    @property
    def target_dtype(self) -> torch.dtype:
        return self.V.dtype if self.kind == "identity" else self.target_weight.dtype

    @property
    def target_bias(self) -> Tensor | None:
        """The frozen bias as a tensor, never the target's Parameter: it is added, not trained (spec C2)."""
        bias = getattr(self._frozen[0], "bias", None) if self.kind in ("linear", "conv1d") else None
        return None if bias is None else bias.detach()

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """(V U)^T, the sum of all subcomponents in nn.Linear's layout."""
        return (self.V @ self.U).T

    @property
    def weight_delta(self) -> Float[Tensor, "d_out d_in"]:
        """D = W - (V U)^T: what the subcomponents miss."""
        return self.target_weight - self.weight

    def activation(self, x: Tensor) -> Float[Tensor, "*leading C"]:
        """x V; for an embedding the row V[x], never a one-hot product (spec C1)."""
        return F.embedding(x, self.V) if self.kind == "embedding" else self.as_components(x) @ self.V

    def as_components(self, x: Tensor) -> Tensor:
        """x in the dtype of V, where the target has another and autocast does not see to it."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.V.dtype)

    def target_product(self, x: Tensor) -> Float[Tensor, "*leading d_out"]:
        """x W^T with the frozen weight, without bias."""
        match self.kind:
            case "identity":
                return x
            case "embedding":
                return self._frozen[0](x)
            case _:
                return F.linear(x, self.target_weight)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None,
        delta_mask: Tensor | None,
        route: Bool[Tensor, " *leading"] | None,
        products: Products | None,
    ) -> Float[Tensor, "*leading d_out"]:
        """The site's output where `route` is True (None: everywhere), the target's elsewhere (spec C4, C6).

        `products` are those of x where they are kept, else None.
        """
        products = products or Products(self, x)
        bias = self.target_bias
        x_weight = None if delta_mask is None and route is None else products.with_weight()
        out = masked_product(products.with_V(), self.U, mask=mask, delta_mask=delta_mask, x_weight=x_weight, bias=bias)
        if self.target_dtype != self.V.dtype:
            out = out.to(self.target_dtype)
        if route is None or x_weight is None:
            return out
        return torch.where(route.unsqueeze(-1), out, x_weight if bias is None else x_weight + bias)

    def extra_repr(self) -> str:
        return f"{self.path}, {self.kind}, d_in={self.d_in}, d_out={self.d_out}, C={self.C}"


def _normal(*shape: int, std: float, like: Tensor | None, generator: torch.Generator) -> Tensor:
    """Drawn in float32 on the CPU whatever the target is, so that the same key gives the same start everywhere."""
    draw = torch.randn(*shape, generator=generator, dtype=torch.float32) * std
    return draw if like is None else draw.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))


class StandIn(nn.Module):
    """Answers for the `module` behind it: a target's own code may read `self.embed.weight`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class Site(StandIn):
    """Stands in the place of the target's module; outside a pass it is that module."""

    def __init__(self, *, module: nn.Module, components: Components, current: CurrentPass):
        super().__init__()
        self.module = module
        self.components = components
        self._current = current

    def forward(self, x: Tensor) -> Tensor:
        now, path = self._current.value, self.components.path
        if now is None:
            return self._own(x)
        if now.inputs is not None:
            if path in now.inputs:
                raise RuntimeError(
                    f"Site {path!r} ran twice in one forward of the target, so it has no single input. Give each use a"
                    " module of its own (the weights may stay shared), or leave it out of `sites`."
                )
            now.inputs[path] = x
        if path in now.masks:
            products = None if now.clean is None else now.clean.products[path]
            now.clean = None  # from here on nothing is as in the clean forward
            out = self.components(
                x,
                mask=now.masks[path],
                delta_mask=None if now.delta_masks is None else now.delta_masks[path],
                route=None if now.routes is None else now.routes[path],
                products=products,
            )
        elif now.clean is not None and path in now.clean.outputs:
            out = now.clean.outputs[path]
        else:
            out = self._own(x)
        if now.outputs is not None:
            now.outputs[path] = out
        return out

    def _own(self, x: Tensor) -> Tensor:
        """What the module gives, or what an open intervention makes of it."""
        edited = None if self._current.edited is None else self._current.edited(self.components, x)
        return self.module(x) if edited is None else edited


class PreIdentity(StandIn):
    """A module with an identity site in front of its first argument (spec C1)."""

    def __init__(self, *, site: Site, module: nn.Module):
        super().__init__()
        self.pre_identity = site
        self.module = module

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self.module(self.pre_identity(x), *args, **kwargs)


class Block(StandIn):
    """A block of the target that holds sites: its result is the clean one until the first masked site has run.

    So a forward with masks in late sites alone starts at the block of the first of them.
    """

    def __init__(self, *, path: str, module: nn.Module, sites: list[str], current: CurrentPass):
        super().__init__()
        self.module = module
        self._path, self._sites = path, sites
        self._current = current

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        now = self._current.value
        if now is None:
            return self.module(*args, **kwargs)
        clean = now.clean
        if clean is not None and self._path in clean.blocks and not any(site in now.masks for site in self._sites):
            if now.outputs is not None:
                now.outputs.update({site: clean.outputs[site] for site in self._sites})
            return clean.blocks[self._path]
        result = self.module(*args, **kwargs)
        if now.blocks is not None:
            now.blocks[self._path] = result
        return result
