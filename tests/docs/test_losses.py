"""The pages of the losses say what the code has: the YAML as shipped, its classes, their arguments and no others."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
from doc_pages import DOCS, ROOT, blocks

SHIPPED = {path.stem: path for path in (ROOT / "conf" / "loss").glob("*.yaml")}
PAGES = {path.stem: path for path in (DOCS / "losses").glob("*.md") if path.stem != "index"}


def arguments_of(dotted: str) -> set[str]:
    """Every named argument of a class, those behind its `**arguments` included."""
    module, _, name = dotted.rpartition(".")
    found: set[str] = set()
    for base in getattr(importlib.import_module(module), name).__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters
        found |= {p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if "arguments" not in parameters:  # `metric_arguments` are for torchmetrics
            break
    return found - {"self"}


def documented(text: str) -> list[tuple[str, set[str]]]:
    """(class, its arguments in the table below it)."""
    sections = re.findall(r"^`(pdlightning[\w.]+)`\n\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    return [
        (cls, {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])})
        for cls, table in sections
    ]


def test_every_loss_has_a_page_and_every_page_a_loss() -> None:
    assert PAGES.keys() == SHIPPED.keys()
    listed = re.findall(r"\]\((\w+)\.md\) \| `(\w+)`", (DOCS / "losses" / "index.md").read_text())
    assert sorted(listed) == [(name, name) for name in sorted(SHIPPED)]


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_page_shows_the_yaml_as_shipped(name: str) -> None:
    shown = [content for language, content in blocks(PAGES[name].read_text()) if language == "yaml"]
    assert shown == [SHIPPED[name].read_text()], f"copy conf/loss/{name}.yaml into docs/losses/{name}.md"


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_page_names_the_classes_of_its_yaml_and_all_their_arguments(name: str) -> None:
    text, shipped = PAGES[name].read_text(), SHIPPED[name].read_text()
    classes = documented(text)
    assert classes and classes[0][0] == re.findall(r"^_target_: ([\w.]+)", shipped, flags=re.MULTILINE)[0]
    for cls, arguments in classes:
        assert cls in shipped, f"{cls} is not in the YAML"
        assert arguments == arguments_of(cls), cls


def test_the_arguments_of_a_class_are_those_it_hands_on_too() -> None:
    found = arguments_of("pdlightning.metrics.SmoothL0Loss")
    assert found == {"coeff", "gamma", "normalised", "beta", "reference_count", "ema_halflife"}
    assert arguments_of("pdlightning.masking.PersistentPGD") >= {"optimizer", "scope", "n_sources"}


def test_the_parts_that_the_index_lists_exist() -> None:
    text = (DOCS / "losses" / "index.md").read_text()
    for module, row in re.findall(r"in `(pdlightning\.\w+)` \|(.*)\|", text):
        home = importlib.import_module(module)
        assert all(hasattr(home, name) for name in re.findall(r"`(\w+)`", row)), row
