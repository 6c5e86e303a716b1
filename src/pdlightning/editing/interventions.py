"""Interventions: while one is open, chosen subcomponents of the target are gone, scaled, added or replaced."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from pdlightning.editing.edits import (
    Amount,
    Indices,
    SiteEdit,
    Values,
    as_indices,
    edited_forward,
    edited_weight,
    in_words,
)
from pdlightning.modules.component_model import ComponentModel
from pdlightning.modules.site import Components
from pdlightning.ranks import refuse_parts


class Intervention:
    """m = start * factor + add as the mask of every subcomponent of the named sites, while it is open (spec C4).

    A named site starts as the target's own weight, every mask and the delta's at 1, or from `masks` and no delta; the
    other sites run as they are. `with` opens it, as often as one likes, one time after the other. Interventions inside
    one another compose: the inner one edits what the outer one leaves.

    Every call of the target inside is edited, from whatever thread; but only one thread may open interventions. Tensors
    are read anew by each call, and gradients flow to them.

    Args:
        model: whose target is edited.
        keep: site -> the subcomponents that remain of it. All others go, and the delta, unless `delta` holds it.
        ablate: site -> the subcomponents that go: W - U_c V_c^T.
        scale: site -> index -> factor of the mask; or a tensor of factors, `[C]` or `[*leading, C]`.
        add: site -> index -> what is added to the mask, so many times the subcomponent; or a tensor, as for `scale`.
        delta: mask of the delta at the named sites (at all sites, where nothing else names one), or site -> mask: True,
            False, a number, or a tensor `[]` or `[*leading]`. None: as it was, but gone at sites of `keep` and `masks`.
        masks: site -> `[C]` or `[*leading, C]` to start from, such as the lower ci of the same batch.
        V: site -> index -> what replaces the column V[:, c], or a whole V.
        U: site -> index -> what replaces the row U[c], or a whole U.
        positions: where masks change: a boolean tensor `[*leading]`, or indices along the last leading axis (for tokens
            the sequence) of each call. V and U are replaced at all positions.

    Raises:
        KeyError: no such site. IndexError: no such subcomponent or position.
        TypeError, ValueError: a value of a wrong kind or shape, or edits that contradict each other. What only a batch
            can show to be wrong is refused by the call of the target.
    """

    def __init__(
        self,
        model: ComponentModel,
        *,
        keep: Mapping[str, Indices] | None = None,
        ablate: Mapping[str, Indices] | None = None,
        scale: Mapping[str, Values] | None = None,
        add: Mapping[str, Values] | None = None,
        delta: Amount | Mapping[str, Amount] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        V: Mapping[str, Values] | None = None,
        U: Mapping[str, Values] | None = None,
        positions: Sequence[int] | Tensor | None = None,
    ):
        arguments = {"keep": keep, "ablate": ablate, "scale": scale, "add": add, "masks": masks, "V": V, "U": U}
        if isinstance(delta, Mapping):
            arguments["delta"], delta = delta, None
        given = {name: sites for name, sites in arguments.items() if sites is not None}
        for name, sites in given.items():
            if not isinstance(sites, Mapping):
                raise TypeError(f"{name}: expected {{site: ...}}, got {in_words(sites)}.")
        named = {path for sites in given.values() for path in sites}
        for path in named:
            _ = model.components[path]  # or else a KeyError with the sites there are
        if positions is not None:
            positions = as_indices(positions, "positions: expected a boolean tensor [*leading], or indices [0, -1]")
        self.model = model
        self.edits: dict[str, SiteEdit] = {}
        for path, components in model.components.items():
            if path in named or (delta is not None and not named):
                here = {name: sites[path] for name, sites in given.items() if path in sites}
                self.edits[path] = SiteEdit(components, **{"delta": delta, **here}, positions=positions)

    def weight(self, path: str) -> Tensor:
        """The weight of an edited site, in nn.Linear's (d_out, d_in) layout; see `edited_weight`."""
        return edited_weight(self.model.components[path], self.edits[path])

    def __enter__(self) -> Intervention:
        refuse_parts(self.model.components)
        now, thread = self.model.current.edited, threading.get_ident()
        opened = now if isinstance(now, Opened) else Opened((), thread)
        if opened.thread != thread:
            raise RuntimeError(
                "Another thread has an intervention open on this decomposition, and which of the two comes first would"
                " be left to chance: open both in one thread, or give each thread its own copy.deepcopy."
            )
        if self in opened.layers:
            raise RuntimeError("This intervention is open already: open another one, made with the same arguments.")
        self.model.current.edited = Opened((*opened.layers, self), thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        opened = self.model.current.edited
        assert isinstance(opened, Opened)
        left = tuple(layer for layer in opened.layers if layer is not self)
        self.model.current.edited = Opened(left, opened.thread) if left else None


@dataclass(frozen=True, eq=False)
class Opened:
    """The interventions that are open, the outermost first, and the thread that opened them."""

    layers: tuple[Intervention, ...]
    thread: int

    def __call__(self, components: Components, x: Tensor) -> Tensor | None:
        edits = [layer.edits[components.path] for layer in self.layers if components.path in layer.edits]
        return edited_forward(components, edits, x) if edits else None
