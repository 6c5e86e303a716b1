"""A cache of its own for every test, and documents on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PDLIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[..., str]:
    """Writes documents as one JSON object per line; returns the path."""

    def write(documents: Sequence[Any], name: str = "documents.jsonl", column: str = "text") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps({column: document, "n": 1}) + "\n" for document in documents))
        return str(path)

    return write
