"""`python -m pdlightning.compare` and `.alpha`, as one types them."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run.conftest import summary_of

from pdlightning import alpha, compare
from pdlightning.run import run

Said = Callable[..., str]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """What a command prints."""

    def call(main: Callable[[], None], *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        main()
        return capsys.readouterr().out

    return call


def test_a_run_compared_with_itself_is_1_and_everything_is_written(finished: Path, tmp_path: Path, said: Said) -> None:
    out = said(compare.main, finished, finished, "--firing", "all", "--out", tmp_path / "out")
    assert re.search(r"linear1 +6, 6 +6, 6 +1\.0000 +1\.0000 +1\.0000 +6 hungarian +the same", out)
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    assert [row["site"] for row in rows] == ["linear1", "linear2", "all"]
    for row in rows:
        assert {row[name] for name in ("mmcs_a_to_b", "mmcs_b_to_a", "mean_matched_cosine")} == {"1.0"}
    stored = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert stored["sites"]["all"]["pairs"] == 12 and stored["mean_ci_above"] is None and stored["step_a"] == 6
    pairs = list(csv.DictReader((tmp_path / "out" / "pairs.csv").open()))
    assert len(pairs) == 12 and all(row["subcomponent_a"] == row["subcomponent_b"] for row in pairs)
    for name in ("similarity_histogram", "similarity_map"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_when_nothing_fires_the_table_says_so(finished: Path, tmp_path: Path, said: Said) -> None:
    out = said(compare.main, finished, finished, "--firing", "2", "--sites", "linear1", "--out", tmp_path / "out")
    assert re.search(r"linear1 +6, 6 +0, 0 +- +- +- +0 hungarian", out)
    assert "No subcomponent of B is left to compare at linear1." in out and "linear2" not in out
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["sites"]["linear1"]["mmcs_a_to_b"] is None
    assert not list((tmp_path / "out").glob("*.png"))


def test_what_cannot_be_compared_is_one_sentence(finished: Path, tmp_path: Path, said: Said) -> None:
    with pytest.raises(SystemExit, match="no site that fits 'h..' in common. Sites of A: linear1, linear2. Sites"):
        said(compare.main, finished, finished, "--sites", "h.*")
    with pytest.raises(SystemExit, match=str(tmp_path)):
        said(compare.main, finished, tmp_path)


def test_other_seeds_of_one_target_decompose_the_same_weights(
    finished: Path, tmp_path: Path, said: Said, tiny: Callable[..., dict]
) -> None:
    run(tiny("seed=5", "pd.sites.linear1=4"), tmp_path / "other")
    out = said(compare.main, finished, tmp_path / "other", "--firing", "all")
    assert re.search(r"linear1 +6, 4 +6, 4 +0\.\d+ +0\.\d+ +0\.\d+ +4 hungarian +the same", out)
    assert "different weights" not in out


def test_the_ends_of_an_alpha_sweep_are_what_the_run_has_logged(finished: Path, tmp_path: Path, said: Said) -> None:
    out = said(alpha.main, finished, "--points", "3", "--out", tmp_path / "out")
    rows = {row["r"]: row for row in csv.DictReader((tmp_path / "out" / "alpha.csv").open())}
    logged = summary_of(finished)["metrics"]
    assert list(rows) == ["0.0", "0.5", "1.0"] and {row["measure"] for row in rows.values()} == {"mse"}
    assert float(rows["0.0"]["value"]) == pytest.approx(logged["eval/ci_masked_recon"], rel=1e-5)
    assert float(rows["1.0"]["value"]) == pytest.approx(logged["eval/unmasked_recon"], rel=1e-5)
    assert float(rows["0.5"]["value"]) != float(rows["0.0"]["value"])
    assert "mse " in out and (tmp_path / "out" / "alpha.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="--points 1: a sweep from 0 to 1 has at least 2"):
        said(alpha.main, finished, "--points", "1")


@pytest.mark.parametrize("module", ["compare", "alpha", "statistics"])
def test_help_needs_no_torch(module: str) -> None:
    code = (
        f"import sys; sys.argv = ['x', '--help']; from pdlightning.{module} import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
