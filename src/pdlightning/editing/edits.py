"""One site under edits of its subcomponents: what it then computes, and the weight that does the same."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pdlightning.modules.site import Components

Indices = Sequence[int] | Tensor
"""Indices from 0 to C - 1, or a boolean tensor `[C]`."""
Amount = float | Tensor
"""A number, a 0-d tensor, or one value for each position, `[*leading]`."""
Values = Mapping[int, Any] | Tensor
"""index -> its value, or a tensor with a value for each subcomponent."""


def in_words(value: Any) -> str:
    """A value that was not expected, short: of a tensor what one can see at a glance."""
    return f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else reprlib.repr(value)


class Edited:
    """What a site runs: masks `[C]` or `[*leading, C]`, the delta's `[]` or `[*leading]`, V and U, and which changed.

    `leading` are the positions of the batch; None where there is none, and nothing may depend on them.
    """

    def __init__(self, components: Components, leading: tuple[int, ...] | None):
        self.components, self.leading = components, leading
        self.V, self.U = components.V, components.U
        self.mask = torch.ones_like(self.U[:, 0], requires_grad=False)
        self.delta: Amount = 1.0
        self.replaced: set[int] = set()

    def fit(self, value: Amount, name: str, *, of: tuple[int, ...] = ()) -> Tensor:
        """A tensor like V, of the shape `of` or `[*leading, *of]`; a leading axis may be 1."""
        value = torch.as_tensor(value).to(self.V)
        axes = tuple(value.shape[: value.ndim - len(of)])
        if axes and self.leading is None:
            raise ValueError(
                f"{name} of site {self.components.path!r}: an exported weight is the same at all positions, so its"
                f" shape must be {list(of)}, got {list(value.shape)}."
            )
        if axes and self.leading is not None and not serves(axes, self.leading):
            raise ValueError(
                f"{name} of site {self.components.path!r} is for positions {list(axes)}, but the site runs on"
                f" {list(self.leading)}. An axis of size 1 serves all of the batch's."
            )
        return value

    def product(self, x: Tensor, V: Tensor, U: Tensor) -> Float[Tensor, "*leading d_out"]:
        """((x V) * m) U over the subcomponents that were replaced."""
        at = self.replaced_at
        embedding = self.components.kind == "embedding"
        activation = F.embedding(x, V[:, at]) if embedding else self.components.as_components(x) @ V[:, at]
        return (activation * self.mask[..., at]) @ U[at]

    @property
    def replaced_at(self) -> Tensor:
        return torch.tensor(sorted(self.replaced), device=self.V.device)


class SiteEdit:
    """What one intervention does at one site; the arguments are those of `Intervention` for that site."""

    def __init__(
        self,
        components: Components,
        *,
        positions: Tensor | None,
        keep: Indices | None = None,
        ablate: Indices | None = None,
        scale: Values | None = None,
        add: Values | None = None,
        delta: Amount | None = None,
        masks: Tensor | None = None,
        V: Values | None = None,
        U: Values | None = None,
    ):
        self.site, self.C, self.positions = components.path, components.C, positions
        self.keep = None if keep is None else self._indices(keep, "keep")
        self.ablate = None if ablate is None else self._indices(ablate, "ablate")
        if masks is not None and not (isinstance(masks, Tensor) and masks.ndim and masks.shape[-1] == self.C):
            got = f"the shape {list(masks.shape)}" if isinstance(masks, Tensor) else in_words(masks)
            raise ValueError(f"masks[{self.site!r}]: expected a tensor [{self.C}] or [*leading, {self.C}], got {got}.")
        self.masks = masks
        self.scale, self.add = self._amounts(scale, "scale"), self._amounts(add, "add")
        d_in, d_out = components.d_in, components.d_out
        self.V = self._vectors(V, "V", one=d_in, whole=(d_in, self.C))
        self.U = self._vectors(U, "U", one=d_out, whole=(self.C, d_out))
        if delta is not None and not isinstance(delta, Real | Tensor):
            raise TypeError(
                f"delta of site {self.site!r}: expected True, False, a number or a tensor, got {in_words(delta)}."
            )
        self.delta = 0.0 if delta is None and not (keep is None and masks is None) else delta
        self._check_agreement()

    def apply(self, now: Edited) -> None:
        """Edit what the site runs: start, keep, ablate, scale, add, in this order."""
        mask, delta, full = now.mask, now.delta, torch.ones_like(now.U[:, 0], requires_grad=False)
        if self.masks is not None:
            mask = now.fit(self.masks, "masks", of=(self.C,))
        if self.keep is not None:
            mask = mask * (0 * full).index_fill(0, self.keep.to(full.device), 1.0)
        if self.ablate is not None:
            mask = mask * full.index_fill(0, self.ablate.to(full.device), 0.0)
        if self.scale is not None:
            mask = mask * self._spread(self.scale, now, "scale", fill=full)
        if self.add is not None:
            mask = mask + self._spread(self.add, now, "add", fill=0 * full)
        if self.delta is not None:
            delta = now.fit(self.delta, "delta") if isinstance(self.delta, Tensor) else float(self.delta)
        if self.positions is not None:
            here = _positions_of(now, self.positions)
            mask = torch.where(here.unsqueeze(-1), mask, now.mask)
            delta = torch.where(here, now.fit(delta, "delta"), now.fit(now.delta, "delta"))
        now.mask, now.delta = mask, delta
        for values, replaced in ((self.V, "V"), (self.U, "U")):
            if values is not None:
                setattr(now, replaced, _replaced(getattr(now, replaced), values, axis=1 if replaced == "V" else 0))
                now.replaced |= _chosen(values, self.C)

    def _spread(self, values: Values, now: Edited, name: str, *, fill: Tensor) -> Float[Tensor, "*leading C"]:
        """A value for each subcomponent, that of `fill` where there is none."""
        if isinstance(values, Tensor):
            return now.fit(values, name, of=(self.C,))
        if not values:
            return fill
        chosen = torch.stack(torch.broadcast_tensors(*(now.fit(x, name) for x in values.values())), dim=-1)
        at = torch.tensor(list(values), device=fill.device)
        return fill.expand(*chosen.shape[:-1], self.C).index_copy(-1, at, chosen)

    def _indices(self, given: Indices, name: str) -> Tensor:
        what = f"{name}[{self.site!r}]: expected indices such as [0, 3], or a boolean tensor [C]"
        found = as_indices(given, what)
        if found.dtype == torch.bool:
            if found.shape != (self.C,):
                raise ValueError(f"{what} with C = {self.C}, got the shape {list(found.shape)}.")
            return found.nonzero().squeeze(1)
        if beyond := [c for c in found.tolist() if not 0 <= c < self.C]:
            raise IndexError(
                f"{name}[{self.site!r}]: no subcomponent {', '.join(map(str, beyond))}; the site has {self.C},"
                f" 0 to {self.C - 1}."
            )
        return found

    def _amounts(self, values: Values | None, name: str) -> Any:
        what = f"{name}[{self.site!r}]: expected {{index: number or tensor [*leading]}} or a tensor [*leading, C]"
        if isinstance(values, Tensor) and (values.ndim == 0 or values.shape[-1] != self.C):
            raise ValueError(f"{what} with C = {self.C}, got the shape {list(values.shape)}.")
        if values is None or isinstance(values, Tensor):
            return values
        found = self._by_index(values, name, what)
        for c, value in found.items():
            if not isinstance(value, Real | Tensor):
                raise TypeError(f"{what}, got {in_words(value)} for {c}.")
        return found

    def _vectors(self, values: Values | None, name: str, *, one: int, whole: tuple[int, int]) -> Any:
        what = f"{name}[{self.site!r}]: expected {{index: tensor [{one}]}} or a tensor {list(whole)}"
        if isinstance(values, Tensor) and tuple(values.shape) != whole:
            raise ValueError(f"{what}, got the shape {list(values.shape)}.")
        if values is None or isinstance(values, Tensor):
            return values
        found = self._by_index(values, name, what)
        for c, value in found.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{what}, got {in_words(value)} for {c}.")
            if tuple(value.shape) != (one,):
                raise ValueError(f"{what}, got the shape {list(value.shape)} for {c}.")
        return found

    def _by_index(self, values: Mapping[int, Any], name: str, what: str) -> dict[int, Any]:
        if not isinstance(values, Mapping):
            raise TypeError(f"{what}, got {in_words(values)}.")
        return dict(zip(self._indices(list(values), name).tolist(), values.values(), strict=True))

    def _check_agreement(self) -> None:
        """An edit of a subcomponent that is to go would be lost without a word."""
        gone = set() if self.ablate is None else set(self.ablate.tolist())
        stays = set(range(self.C)) if self.keep is None else set(self.keep.tolist())
        uses = {"keep": stays if self.keep is not None else set()}
        uses |= {n: set(x) for n in ("scale", "add", "V", "U") if isinstance(x := getattr(self, n), Mapping)}
        for name, used in uses.items():
            if both := sorted(used & gone):
                raise ValueError(f"Site {self.site!r}: {name} and ablate both name {both}; say one of them.")
            if name != "add" and (lost := sorted(used - stays)):
                raise ValueError(f"Site {self.site!r}: {name} names {lost}, which keep leaves out: add them to keep.")


def edited_forward(components: Components, edits: Iterable[SiteEdit], x: Tensor) -> Float[Tensor, "*leading d_out"]:
    """The site's output under its edits, the outermost first (spec C4), and what replaced V and U change in it."""
    now = Edited(components, tuple(x.shape if components.kind == "embedding" else x.shape[:-1]))
    for edit in edits:
        edit.apply(now)
    delta_mask = None if isinstance(now.delta, float) and now.delta == 0 else now.fit(now.delta, "delta")
    out = components(x, mask=now.mask, delta_mask=delta_mask, route=None, products=None)
    if now.replaced:
        change = now.product(x, now.V, now.U) - now.product(x, components.V, components.U)
        out = out + change.to(out.dtype)
    return out


def edited_weight(components: Components, edit: SiteEdit) -> Float[Tensor, "d_out d_in"]:
    """m_D W + sum_c [(m_c - m_D) U_c V_c^T + m_c (U'_c V'_c^T - U_c V_c^T)], U' and V' being what replaced U and V.

    A subcomponent whose mask is the delta's leaves no rounding behind.

    Raises:
        ValueError: the edit differs from one position to another.
    """
    if edit.positions is not None:
        raise ValueError("positions: an exported weight is the same at all positions; leave them out.")
    now = Edited(components, leading=None)
    edit.apply(now)
    weight = now.delta * components.target_weight.to(now.V.dtype)
    weight = weight + ((components.V * (now.mask - now.delta)) @ components.U).T
    if now.replaced:
        at = now.replaced_at
        kept = components.V[:, at] * now.mask[at], now.V[:, at] * now.mask[at]
        weight = weight + (kept[1] @ now.U[at] - kept[0] @ components.U[at]).T
    return weight


def as_indices(given: Indices, expected: str) -> Tensor:
    """A boolean tensor of any shape, or whole numbers [n]; anything else is a TypeError that begins with `expected`."""
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        found = torch.tensor(0.0)
    if found.ndim == 1 and not len(found):
        found = found.long()
    if found.is_floating_point() or found.is_complex() or (found.dtype != torch.bool and found.ndim != 1):
        raise TypeError(f"{expected}, got {in_words(given)}.")
    return found if found.dtype == torch.bool else found.long()


def serves(shape: Sequence[int], leading: Sequence[int]) -> bool:
    """Whether a tensor of this shape has a value for all these positions, some of them for a whole axis."""
    return len(shape) == len(leading) and all(n in (1, size) for n, size in zip(shape, leading, strict=True))


def _positions_of(now: Edited, positions: Tensor) -> Tensor:
    """A boolean tensor that serves the positions of this call."""
    leading = now.leading
    assert leading is not None
    if positions.dtype == torch.bool:
        if not serves(positions.shape, leading):
            raise ValueError(
                f"positions has the shape {list(positions.shape)}, but site {now.components.path!r} runs on"
                f" {list(leading)}. An axis of size 1 serves all of the batch's."
            )
        return positions.to(now.V.device)
    n = leading[-1] if leading else 0
    if beyond := [i for i in positions.tolist() if not -n <= i < n]:
        raise IndexError(
            f"positions {beyond} are not among the {n} of the last leading axis of site {now.components.path!r}, which"
            f" runs on {list(leading)}. They count within one call; with a key-value cache that has new tokens alone."
        )
    here = torch.zeros(*[1] * (len(leading) - 1), n, dtype=torch.bool, device=now.V.device)
    return here.index_fill(-1, positions.to(here.device) % n, True)


def _chosen(values: Values, C: int) -> set[int]:
    return set(range(C)) if isinstance(values, Tensor) else set(values)


def _replaced(whole: Tensor, values: Values, *, axis: int) -> Tensor:
    if isinstance(values, Tensor):
        return values.to(whole)
    if not values:
        return whole
    new = torch.stack([value.to(whole) for value in values.values()], dim=axis)
    return whole.index_copy(axis, torch.tensor(list(values), device=whole.device), new)
