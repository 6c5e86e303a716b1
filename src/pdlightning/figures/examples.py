"""The page of top activating examples: one HTML file, tokens coloured by ci, no network and no server needed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple, Self

Decode = Callable[[Sequence[int]], list[str]]

N_SUMMARY = 8
SHOWN_CI = 0.005  # what would print as 0.00 gets no colour


@dataclass(frozen=True)
class Example:
    """The tokens around one position of one row, with the ci of a subcomponent at each of them.

    Attributes:
        row, position: where the peak is.
        ids, ci: the tokens of the window that lie in the row.
        peak: the index in `ids` of the token with the peak.
    """

    row: int
    position: int
    ids: tuple[int, ...]
    ci: list[float]
    peak: int

    @classmethod
    def around(cls, *, row: int, position: int, ids: list[int], ci: list[float], no_token: int) -> Self:
        """From a window with its peak in the middle, filled up with `no_token` where the row ends."""
        inside = [i for i, token in enumerate(ids) if token != no_token]
        return cls(row, position, tuple(ids[i] for i in inside), [ci[i] for i in inside], inside.index(len(ids) // 2))


@dataclass(frozen=True)
class Subcomponent:
    """One of those shown of a site.

    Attributes:
        mean_ci: over all positions.
        peak: mean ci at the peaks of its examples.
        density: the share of positions where it fires.
        ranks: by mean ci and by peak, from 1 on.
    """

    index: int
    mean_ci: float
    peak: float
    density: float
    ranks: tuple[int, int]
    examples: list[Example]


@dataclass(frozen=True)
class Site:
    """A site, how many of its C subcomponents fire at all, and the ones shown."""

    path: str
    C: int
    n_firing: int
    subcomponents: list[Subcomponent]


class Piece(NamedTuple):
    """A token with its ci; or the text of several tokens without any, `ci` None."""

    text: str
    ci: float | None
    is_peak: bool


def examples_page(
    sites: Sequence[Site],
    *,
    decode: Decode | None,
    rows: int,
    positions: int,
    threshold: float,
) -> str:
    """The page as HTML.

    Args:
        sites: what is shown.
        decode: from neighbouring token ids to the text of each; None shows the ids.
        rows, positions: how many were looked at.
        threshold: of firing; part of what the page says.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    space = "" if decode else " "
    decode = cache(decode or (lambda ids: [str(token) for token in ids]))
    environment = Environment(
        loader=PackageLoader("pdlightning.figures", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("examples.html.jinja").render(
        sites=sites,
        pieces=lambda example: list(pieces(example, decode, space=space)),
        summary=lambda subcomponent: most_highlighted(subcomponent, decode, threshold=threshold),
        rows=rows,
        positions=positions,
        threshold=threshold,
        has_text=not space,
    )


def examples_data(sites: Sequence[Site], *, decode: Decode | None) -> dict[str, Any]:
    """What the page shows as plain values, every token as its visible text."""
    texts = cache(decode or (lambda ids: [str(token) for token in ids]))

    def plain(e: Example) -> dict[str, Any]:
        tokens, ci = [visible(text) for text in texts(e.ids)], [round(ci, 3) for ci in e.ci]
        return {"row": e.row, "position": e.position, "peak": e.peak, "tokens": tokens, "ci": ci}

    shown = [
        {**vars(site), "subcomponents": [
            {**vars(c), "examples": [plain(example) for example in c.examples]} for c in site.subcomponents
        ]}
        for site in sites
    ]  # fmt: skip
    return {"has_text": decode is not None, "sites": shown}


def pieces(example: Example, decode: Decode, *, space: str) -> Iterator[Piece]:
    """The window in order; neighbours without ci are one piece, `space` stands between tokens."""
    tokens = [
        Piece(text, ci if ci >= SHOWN_CI else None, i == example.peak)
        for i, (text, ci) in enumerate(zip(decode(example.ids), example.ci, strict=True))
    ]
    for n, (shown, group) in enumerate(groupby(tokens, key=lambda piece: piece.ci is not None)):
        together = list(group)
        if n and space:
            yield Piece(space, None, False)
        if not shown:
            yield Piece(visible(space.join(piece.text for piece in together)), None, False)
            continue
        for i, piece in enumerate(together):
            if i and space:
                yield Piece(space, None, False)
            yield piece._replace(text=visible(piece.text))


def visible(text: str) -> str:
    """With signs in the place of what cannot be seen; a single space between words stays one."""
    text = text.replace("\r\n", "\n").replace("\n", "↵").replace("\t", "⇥")
    text = re.sub(" {2,}|^ $", lambda spaces: "·" * len(spaces[0]), text)
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def most_highlighted(subcomponent: Subcomponent, decode: Decode, *, threshold: float) -> list[tuple[str, int]]:
    """The tokens that fire most often in the examples of a subcomponent, with how often; every space is visible."""
    counts = Counter(
        text
        for example in subcomponent.examples
        for text, ci in zip(decode(example.ids), example.ci, strict=True)
        if ci > threshold
    )
    return [(visible(text).replace(" ", "·"), n) for text, n in counts.most_common(N_SUMMARY)]
