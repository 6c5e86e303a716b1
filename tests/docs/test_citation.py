"""CITATION.cff and CHANGELOG.md are of this version, and in their formats."""

from __future__ import annotations

import re

import yaml
from doc_pages import ROOT

import pdlightning

AUTHOR = ({"name"}, {"family-names", "given-names"})


def test_the_citation_is_of_this_version_and_has_what_its_schema_requires() -> None:
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cff["cff-version"] == "1.2.0" and cff["type"] == "software" and cff["message"] and cff["title"]
    assert cff["version"] == pdlightning.__version__ and cff["license"] == "MIT"
    for work in (cff, *cff["references"]):
        assert work["authors"] and all(set(author) in AUTHOR for author in work["authors"])
    for paper in cff["references"]:
        assert paper["type"] == "article" and isinstance(paper["year"], int) and paper["url"].startswith("https://")


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (Unreleased|\d{4}-\d\d-\d\d)$", text, flags=re.MULTILINE)
    assert versions[0][0] == pdlightning.__version__
    kinds = set(re.findall(r"^### (\w+)$", text, flags=re.MULTILINE))
    assert kinds and kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_package_is_typed() -> None:
    assert (ROOT / "src" / "pdlightning" / "py.typed").is_file()
