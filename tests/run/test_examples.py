"""The page of examples in the folder of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pdlightning.data import InductionTokens
from pdlightning.run import run

Composed = Callable[..., dict[str, Any]]


@pytest.fixture
def small(composed: Composed) -> dict[str, Any]:
    words = ("experiment=induction", "debug=fast", "steps=2", "data.batch_size=4", "runtime.keep_memory=false")
    config = composed(*words, "target.data.batch_size=4", "logging.eval_every=2", "logging.slow_eval_every=2")
    config["metric"] = {"fast": {}, "slow": {"examples": config["metric"]["slow"]["examples"]}}
    config["pd"]["sites"] = {"layers.0.attn.v_proj": 6}
    return config


def test_a_run_leaves_a_page_with_the_texts_of_its_data(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def decode(self: InductionTokens, ids: Sequence[int]) -> list[str]:
        return [f" <word{i}>" for i in ids]

    monkeypatch.setattr(InductionTokens, "decode", decode, raising=False)
    run(small, tmp_path / "run")
    page = tmp_path / "run" / "figures" / "examples.html"
    assert f"To read in a browser: {page}" in caplog.text
    html = page.read_text()
    assert "layers.0.attn.v_proj" in html and "> &lt;word" in html and "<word" not in html
    assert "among 4 rows with 256 positions" in html


def test_a_page_that_cannot_be_made_ends_no_run(small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(InductionTokens, "decode", lambda self, ids: ["too few"], raising=False)
    with pytest.warns(UserWarning, match="The figure 'examples' failed and is skipped; the run goes on"):
        assert run(small, tmp_path / "run")["steps"] == 2
    assert not list((tmp_path / "run").glob("figures/*.html"))
