"""The site: every page is in the navigation, every link leads somewhere, and it builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_pages import DOCS, ROOT, anchors, links, nav, pages


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    entries = nav()
    missing, unlisted = [e for e in entries if not (DOCS / e).is_file()], [p for p in pages() if p not in entries]
    assert not missing, f"in the nav of mkdocs.yml, but not written: {', '.join(missing)}"
    assert not unlisted, f"written, but not in the nav of mkdocs.yml: {', '.join(unlisted)}"
    assert len(set(entries)) == len(entries)


@pytest.mark.parametrize("page", [*pages(), "../README.md", "../CHANGELOG.md"])
def test_every_relative_link_and_anchor_of_a_page_resolves(page: str) -> None:
    path, broken = DOCS / page, []
    for link in links(path.read_text()):
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        if not target.exists():
            broken.append(f"{link}: no {place}")
        elif anchor and anchor not in anchors(target.read_text()):
            broken.append(f"{link}: no such heading")
        elif page in pages() and not target.is_relative_to(DOCS):
            broken.append(f"{link}: outside docs/, which the site does not have")
    assert not broken, f"{page}: {'; '.join(broken)}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_builds_strictly_and_fetches_nothing(site: Path) -> None:
    html = {path: path.read_text() for path in site.rglob("*.html")}
    assert len(html) >= len(nav())
    for path, text in html.items():
        fetched = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?:[^\s\">]+)", text)
        assert not fetched, f"{path.relative_to(site)} fetches {fetched}"


def test_formulas_are_mathml(site: Path) -> None:
    text = (site / "losses" / "faithfulness.html").read_text()
    assert text.count("<math") >= 1 and "lVert" not in text
