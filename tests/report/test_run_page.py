"""The page of a run: what it shows, what it says is missing, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_folders import HOSTILE, config_of, payload_of, write_examples, write_run, write_sites

from pdlightning.report import build
from pdlightning.report.build import report_afterwards, write_report
from pdlightning.report.curves import curve, curve_charts, extremes
from pdlightning.report.matrices import heat_map
from pdlightning.report.tables import SPECTRUM_POINTS, cells, digits_apart, sorted_curve
from pdlightning.storage import StorageError


def page_of(folder: Path) -> str:
    return write_report(folder).read_text()


def test_a_finished_run_shows_its_verdict_goals_curves_and_every_number(tmp_path: Path):
    page = page_of(write_run(tmp_path / "run", config_of()))
    assert '<span class="verdict good">solved</span>' in page
    assert re.search(r"ci_<wbr>l0_<wbr>0.1/<wbr>total</th><td>2</td><td>&lt;=\s3</td><td class=\"good\">✓ ok", page)
    assert "1e-09" in page, "a tiny number is never 0"
    assert "recon × 1e-05, later × 3 (cosine)" in page
    assert "ce_kl: the target's own CE is 2.5 nats." in page
    charts = {chart["id"]: chart for chart in payload_of(page)["charts"]}
    assert charts["curve-loss"]["series"][0]["y"][:2] == [1.0, 0.71653]
    assert charts["curve-l0"]["goals"] == [{"name": "ci_l0_0.1/total", "max": 3.0}]
    assert [s["name"] for s in charts["curve-CEandKL-kl"]["series"]] == ["ci"]


def test_a_goal_that_is_missed_is_said_so(tmp_path: Path):
    page = page_of(write_run(tmp_path / "run", config_of(), scale=2.0))
    assert "NOT solved</span>" in page and "✗ MISSED" in page


def test_a_run_that_was_never_evaluated_has_a_report_of_what_there_is(tmp_path: Path):
    page = page_of(write_run(tmp_path / "run", config_of(), evaluated=False, ended=False))
    assert "not finished</span>" in page
    assert "This run was never evaluated" in page and "has not come to its end" in page and "100 of 100 steps" in page
    assert "not measured</td>" in page
    assert [chart["id"] for chart in payload_of(page)["charts"]] == ["curve-loss", "curve-l0"]


def test_a_run_that_has_just_begun_has_a_report_of_its_config(tmp_path: Path):
    folder = write_run(tmp_path / "run", config_of(), ended=False)
    (folder / "metrics.csv").unlink()
    page = page_of(folder)
    assert "Nothing was logged yet" in page and "pd.ci_fn.hidden" in page and payload_of(page)["charts"] == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{"), ("summary.json", "{}"), ("metrics.csv", "step,loss/a\n1,x\n"),
        ("metrics.csv", "loss/a\n1\n"), ("environment.json", "[]"), ("figures/sites.json", "{}"),
        ("figures/mean_ci_log.png", "no picture"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_left_out_and_said_so(name: str, content: str, tmp_path: Path):
    folder = write_run(tmp_path / "run", config_of())
    (folder / "figures").mkdir()
    (folder / name).write_text(content)
    page = page_of(folder)
    assert Path(name).name in page and "left out" in page


@pytest.mark.parametrize("content", ["a: [", "just words", "name: x\n"])
def test_a_damaged_config_is_refused_in_a_sentence(content: str, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(StorageError, match=r"config.yaml is (damaged|not the config of a run)"):
        write_report(tmp_path)


def test_a_folder_that_is_no_run_ends_the_command_with_a_sentence(tmp_path: Path):
    for folder, words in ((tmp_path, "neither the folder of a run"), (tmp_path / "none", "is not a folder")):
        command = [sys.executable, "-m", "pdlightning.report", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_out_says_where_the_page_goes_and_links_still_lead_to_the_run(tmp_path: Path):
    folder = write_run(tmp_path / "run", config_of())
    (folder / "figures").mkdir()
    (folder / "figures" / "examples.html").write_text("a page")
    out = write_report(folder, tmp_path / "elsewhere" / "page.html")
    assert '<a href="../run/figures/examples.html">' in out.read_text()
    assert not (folder / "report.html").exists()


def test_names_from_a_config_are_text_and_nothing_else(tmp_path: Path):
    goal = {f"eval/{HOSTILE}": {"max": 1.0}}
    folder = write_run(tmp_path / "run", config_of(HOSTILE, goal=goal))
    write_sites(folder, {HOSTILE: 3})
    write_examples(folder, HOSTILE, " and more")
    page = page_of(folder)
    assert "<img src=x" not in page and page.count("<script") == 2 and page.count("</script>") == 2
    assert payload_of(page)["examples"]["sites"][0]["subcomponents"][0]["examples"][0]["tokens"][0] == HOSTILE


def test_only_our_own_style_and_script_may_run(tmp_path: Path):
    page = page_of(write_run(tmp_path / "run", config_of()))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    rules = policy[1].replace("&#39;", "'")
    for tag in ("style", "script"):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        assert len(content) == 1
        assert f"'sha256-{base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()}'" in rules
    assert rules.startswith("default-src 'none'") and "unsafe" not in rules and "http" not in rules
    assert not re.search(r"<[^>]+\son\w+=|<[^>]+\sstyle=|(src|href)=\"(?!data:|#)", page)


def test_seventy_two_sites_of_a_language_model_stay_within_a_few_megabytes(tmp_path: Path):
    folder = write_run(tmp_path / "run", config_of(), rows=20_000)
    write_sites(folder, {f"h.{i // 6}.site_{i % 6}": 2560 for i in range(72)})
    page = page_of(folder)
    assert len(page.encode()) < 3_000_000
    spectra = [chart for chart in payload_of(page)["charts"] if chart["id"].startswith("spectrum")]
    assert [len(chart["series"]) for chart in spectra] == [72, 72]


def test_a_failing_report_loses_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> str:
        raise RuntimeError("the template")

    monkeypatch.setattr(build, "run_page", broken)
    with pytest.warns(UserWarning, match=r"The report of .* failed and is skipped"):
        report_afterwards(write_run(tmp_path / "run", config_of()))


def test_a_long_curve_keeps_its_extremes_and_its_ends():
    values = np.sin(np.arange(10_000.0) / 50)
    values[1234], values[7777] = 40.0, -40.0
    kept = extremes(values, stretches=100)
    assert {0, 1234, 7777, 9999} <= set(kept.tolist()) and len(kept) <= 202
    thin = curve([{"step": i, "a": v} for i, v in enumerate(values)], "a", label="a", points=200)
    assert (max(thin["y"]), min(thin["y"])) == (40.0, -40.0) and thin["x"] == kept.tolist()


def test_a_value_that_is_not_finite_is_no_point_of_a_curve():
    rows = [{"step": 0.0, "loss/a": 1.0}, {"step": 1.0, "loss/a": float("inf")}, {"step": 2.0, "loss/a": 3.0}]
    assert curve(rows, "loss/a", label="a")["x"] == [0, 2]
    assert json.loads(json.dumps(curve_charts(rows, config_of()), allow_nan=False))[0]["series"][0]["y"] == [1.0, 3.0]


def test_what_is_counted_beside_errors_has_a_chart_of_its_own():
    metrics = {
        "identity_one": {"_target_": "pdlightning.metrics.IdentityError", "n_features": 5},
        "identity_two": {"_target_": "pdlightning.metrics.IdentityError", "n_features": 5},
        "dense": {"_target_": "pdlightning.metrics.DenseError", "n_features": 5},
    }
    logged = [
        "identity_one/tol_0.1",
        "identity_one/recovered",
        "identity_two/recovered",
        "dense/tol_0.1",
        "dense/firing",
    ]
    rows = [{"step": float(i), **{f"eval/{name}": float(i) for name in logged}} for i in range(3)]
    config = config_of(metric={"fast": {}, "slow": metrics}, goal={"eval/identity_one/recovered": {"min": 5}})
    charts = {chart["title"]: chart for chart in curve_charts(rows, config)}
    assert {title: [s["name"] for s in chart["series"]] for title, chart in charts.items()} == {
        "Errors against the identity": ["tol_0.1"],
        "Features recovered": ["identity_one (of 5)", "identity_two (of 5)"],
        "Errors against the dense truth": ["tol_0.1"],
        "Subcomponents that fire in the single-feature probe": ["dense"],
    }
    recovered = charts["Features recovered"]
    assert recovered["y"] == "features" and recovered["goals"] == [{"name": "identity_one (of 5)", "min": 5}]


def test_a_spectrum_says_how_many_subcomponents_lie_above_the_threshold(tmp_path: Path):
    folder = write_run(tmp_path / "run", config_of())
    mean_ci = write_sites(folder, {"h.0": 30, "h.1": 2000})
    used = {site: sum(value > 0.001 for value in values) for site, values in mean_ci.items()}
    said = {chart["id"]: chart.get("said") for chart in payload_of(page_of(folder))["charts"]}
    assert said["spectrum-mean_ci"] == (
        f"Subcomponents with a mean ci above 0.001: h.0 {used['h.0']} of 30, h.1 {used['h.1']} of 2000."
    )
    assert said["spectrum-density"] == "Subcomponents with any firing: h.0 30 of 30, h.1 2000 of 2000."
    assert said["curve-loss"] is None


def test_values_are_told_apart_by_as_few_digits_as_that_takes():
    assert digits_apart([1.0, 2.0, 2.0]) == 4
    assert digits_apart([0.0142440, 0.0142411]) == 5
    assert digits_apart([1.0, 1.0 + 1e-12]) == 4, "eight digits would not tell them apart either"
    assert [cell.text for cell in cells([0.0142440, 0.0142411, None, 3])] == ["0.014244", "0.014241", "–", "3"]
    assert cells([1 / 3])[0] == ("0.3333", 1 / 3, "0.3333333333333333")


def test_a_long_spectrum_is_sampled_in_falling_order_with_its_subcomponents():
    values = [((7919 * c) % 10_007) / 10_007 for c in range(10_000)]
    found = sorted_curve("site", values)
    assert len(found["x"]) <= SPECTRUM_POINTS and (found["x"][0], found["x"][-1]) == (1, 10_000)
    assert found["y"] == sorted(found["y"], reverse=True)
    assert all(values[c] == pytest.approx(y, rel=1e-4) for c, y in zip(found["index"], found["y"], strict=True))


def test_a_heat_map_carries_its_values_and_leaves_out_the_last_columns_where_there_are_too_many():
    values = np.linspace(-2, 2, 60, dtype=np.float32).reshape(4, 15)
    arguments = {"id": "i", "title": "t", "rows": "r", "columns": [str(c) for c in range(15)], "what": "", "limit": 2.0}
    for room, n in ((60, 15), (45, 11)):
        made = heat_map(values=values, colours="weight", room=room, **arguments)
        decoded = np.frombuffer(base64.b64decode(made["values"]), "<f2").reshape(4, n)
        np.testing.assert_allclose(decoded, values[:, :n], rtol=1e-3)
        assert (len(made["columns"]), made["left_out"]) == (n, 15 - n)
