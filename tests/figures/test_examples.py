"""The page of top activating examples as HTML."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pdlightning.figures.examples import Decode, Example, Piece, Site, Subcomponent, examples_page, pieces, visible

TEXTS = {1: " a", 2: "b\n", 3: "  "}


def decode(ids: Sequence[int]) -> list[str]:
    return [TEXTS[i] for i in ids]


EXAMPLE = Example(row=4, position=2, ids=(1, 2, 1, 3), ci=[0.0, 0.004, 0.9876, 0.2], peak=2)


def page(*subcomponents: Subcomponent, decode: Decode | None = None) -> str:
    return examples_page(
        [Site(path="h.0<mlp>", C=7, n_firing=len(subcomponents), subcomponents=list(subcomponents))],
        decode=decode,
        rows=1234,
        positions=123400,
        threshold=0.25,
    )


def subcomponent(*examples: Example) -> Subcomponent:
    return Subcomponent(index=3, mean_ci=1.23e-5, peak=0.98, density=0.5, ranks=(7, 1), examples=list(examples))


def test_numbers_stand_where_they_belong() -> None:
    html = page(subcomponent(EXAMPLE), decode=decode)
    assert (
        '<li title="row 4, position 2"><i>0.99</i> ab↵<mark class="peak" style="--c:0.99" title="0.988"> a</mark>'
        in html
    )
    assert '<mark style="--c:0.20" title="0.200">··</mark></li>' in html
    assert "mean ci 1.23e-05 (rank 7)" in html and "at the peaks 0.98 (rank 1)" in html and "fires at 50 %" in html
    assert "<code>·a</code>×1" in html and "<code>··</code>" not in html, "0.2 is below the threshold of firing"
    assert "1,234 rows with 123,400 positions" in html and "ci &gt; 0.25" in html
    assert "<h2>h.0&lt;mlp&gt;</h2>\n<p>1 of 7 subcomponents fire; 1 shown.</p>" in html


def test_neighbours_without_ci_are_one_piece() -> None:
    assert list(pieces(EXAMPLE, decode, space="")) == [
        Piece(" ab↵", None, False), Piece(" a", 0.9876, True), Piece("··", 0.2, False),
    ]  # fmt: skip


def test_ids_are_set_apart_where_there_is_no_text() -> None:
    assert "".join(piece.text for piece in pieces(EXAMPLE, lambda ids: [str(i) for i in ids], space=" ")) == "1 2 1 3"
    assert "these are token ids" in page(subcomponent(EXAMPLE)) and "· space" not in page(subcomponent(EXAMPLE))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", " the"),
        ("the ", "the "),
        (" ", "·"),
        ("a    b", "a····b"),
        ("\n\n    if", "↵↵····if"),
        ("\r\n\tx", "↵⇥x"),
        ("\u202e\x00", "\\u202e\\x00"),
        ("naïve 日本 🙂", "naïve 日本 🙂"),
    ],
)
def test_what_cannot_be_seen_has_a_sign(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_site_where_nothing_fires_says_so() -> None:
    assert "0 of 7 subcomponents fire; 0 shown." in page()


def test_a_decoder_that_loses_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        page(subcomponent(EXAMPLE), decode=lambda ids: ["a"])
