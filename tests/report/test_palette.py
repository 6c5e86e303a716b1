"""Every text of a report can be read in both schemes: WCAG's contrast of 4.5 for words, 3 for lines."""

from __future__ import annotations

import re

import pytest

from pdlightning.report.page import assets
from pdlightning.report.palette import ON, PALETTE, TEXT


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_measure_is_that_of_the_standard():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_words_stand_out_from_what_they_stand_on(scheme: int):
    grounds = [(name, ground) for name in TEXT for ground in ("paper", "card")] + list(ON.items())
    grounds += [("ink", "wait-paper"), ("ink", "good-paper"), ("accent", "good-paper"), ("bad", "good-paper")]
    for name, ground in grounds:
        found = contrast(PALETTE[name][scheme], PALETTE[ground][scheme])
        assert found >= 4.5, f"{name} on {ground}: {found:.2f}"


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_curves_stand_out_from_the_paper(scheme: int):
    lines = [name for name in PALETTE if name.startswith("series-")] + ["first", "last", "good", "quiet"]
    for name in lines:
        found = contrast(PALETTE[name][scheme], PALETTE["paper"][scheme])
        assert found >= 3, f"{name}: {found:.2f}"


def test_no_colour_of_a_text_comes_from_elsewhere():
    style, script = assets()
    known = {f"--{name}" for name in PALETTE} | {"--c"}
    assert set(re.findall(r"var\((--[\w-]+)\)", style)) <= known
    assert {name for name in re.findall(r"var\((--[\w-]+)\)", script) if "$" not in name} <= known
    after_palette = style.split("}\n", 3)[-1]
    assert set(re.findall(r"[^-]color: (?!var|inherit)([^;} ]+)", after_palette)) == set()
