"""Every run leaves a report, and a report costs no run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from run_folders import payload_of

from pdlightning.loading import load_run
from pdlightning.report.build import write_report


def test_a_run_leaves_its_report_with_sites_probe_and_weights(finished: Path):
    page = (finished / "report.html").read_text()
    assert len(page.encode()) < 3_000_000
    payload = payload_of(page)
    titles = [chart["title"] for chart in payload["charts"]]
    assert titles[:2] == ["Training losses, unweighted", "Subcomponents that fire at a position (ci-L0)"]
    assert [m["title"] for m in payload["maps"]][:2] == ["linear1", "linear2"]
    assert {"V of linear1", "U of linear1"} <= {m["title"] for m in payload["maps"]}
    assert page.count('class="picture"') == len(list((finished / "figures").glob("*.png")))


def test_the_report_of_a_run_can_be_made_again_and_says_the_same(finished: Path, tmp_path: Path):
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    again = write_report(copy).read_text()
    assert again.replace(str(copy.absolute()), "") == (finished / "report.html").read_text().replace(str(finished), "")


def test_the_data_of_the_sites_is_that_of_the_decomposition(finished: Path):
    sites = json.loads((finished / "figures" / "sites_0.1.json").read_text())["sites"]
    decomposition = load_run(finished).decomposition
    for path, c in decomposition.components.items():
        expected = float((c.target_weight - c.weight).detach().square().mean())
        assert abs(sites[path]["faithfulness"] - expected) <= 1e-4 * expected
        assert len(sites[path]["mean_ci"]) == c.C
