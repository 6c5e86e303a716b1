"""The pages of the documentation as text: their code blocks, headings and links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


class _AnyTag(yaml.SafeLoader):
    """mkdocs.yml may name Python objects: they are of no interest here."""


_AnyTag.add_multi_constructor("!", lambda *_: None)
_AnyTag.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def nav() -> list[str]:
    """The pages of the navigation, in its order."""

    def walk(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        return [page for child in (node.values() if isinstance(node, dict) else node) for page in walk(child)]

    return walk(yaml.load((ROOT / "mkdocs.yml").read_text(), _AnyTag)["nav"])


def pages() -> list[str]:
    return sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def blocks(text: str) -> list[tuple[str, str]]:
    """(what stands behind the opening fence, content) of every fenced block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """The page without its code."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def links(text: str) -> list[str]:
    """Targets of links and images, in Markdown and in HTML."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(text)) + re.findall(r"(?:href|src)=\"([^\"]+)\"", prose(text))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(text: str) -> set[str]:
    """What a link may name behind #: headings as the site and GitHub slug them, and ids in HTML."""
    code_free = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", code_free, flags=re.MULTILINE)
    return {slug(heading) for heading in headings} | set(re.findall(r"id=\"([^\"]+)\"", code_free))


def slug(heading: str) -> str:
    words = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
    return re.sub(r"[-\s]+", "-", words)
