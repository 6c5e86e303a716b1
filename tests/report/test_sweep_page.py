"""The page of a sweep: what was swept, which jobs are solved, which have no result and why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from run_folders import config_of, payload_of, write_run

from pdlightning.report.build import write_report
from pdlightning.report.read import read_jobs
from pdlightning.report.sweep import swept_settings


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two seeds of two coefficients: those of the larger one miss their goal."""
    folder = tmp_path / "sweep"
    for i, (seed, coeff) in enumerate([(0, 0.1), (1, 0.1), (0, 0.5), (1, 0.5)]):
        config = config_of(seed=seed, data={"seed": seed}, logging={"run_name": f"run {i}"})
        config["pd"]["losses"]["recon"]["coeff"] = coeff
        write_run(folder / f"{i}_seed={seed}", config, scale=1.0 if coeff == 0.1 else 2.0)
    return folder


def test_what_differs_is_what_was_swept_and_a_copy_of_a_setting_is_none(sweep: Path):
    runs = [job.run for job in read_jobs(sweep) if job.run]
    names, values = swept_settings(runs)
    assert names == ["seed", "pd.losses.recon.coeff"]
    assert {k: cell.text for k, cell in values["2_seed=0"].items()} == {"seed": "0", "pd.losses.recon.coeff": "0.5"}


def test_what_a_sweep_wrote_into_its_jobs_comes_before_what_differs(tmp_path: Path):
    for i in (0, 1):
        logging = {"swept": {"seed": i}}
        write_run(tmp_path / str(i), config_of(seed=i, steps=100 + i, logging=logging, labels={"size": f"s{i}"}))
    names, values = swept_settings([job.run for job in read_jobs(tmp_path) if job.run])
    assert names == ["seed", "size"] and [cell.text for cell in values["1"].values()] == ["1", "s1"]


def test_what_was_swept_stands_in_the_order_of_the_command(tmp_path: Path):
    for i in range(4):
        swept = {"z.longer.name": i // 2, "seed": i % 2, "a": f"{i}"}
        write_run(tmp_path / str(i), config_of(seed=i % 2, logging={"swept": swept}, labels={"b": f"{i % 3}"}))
    names, _ = swept_settings([job.run for job in read_jobs(tmp_path) if job.run])
    assert names == ["z.longer.name", "seed", "a", "b"]
    final = {chart["id"]: chart for chart in payload_of(write_report(tmp_path).read_text())["charts"]}
    assert final["final-eval-loss-total"]["x"] == "z.longer.name"


def test_continuous_values_are_short_and_still_told_apart(search: Path):
    page = write_report(search).read_text()
    assert "<dd>0.0012521, 0.00070357, 0.0084591, 0.0084593</dd>" in page
    assert '<td data-value="0.008459126528049376" title="0.008459126528049376">0.0084591</td>' in page
    charts = {chart["id"]: chart for chart in payload_of(page)["charts"]}
    names = [s["name"] for s in charts["jobs-eval-loss-total"]["series"]]
    assert names[0] == "0: lr.start 0.0012521, ci_fn a_long_name_of_ci_function_0"
    assert ">1e-09</td>" in page and ">1.00001e-09</td>" in page, "jobs that end almost alike"
    assert charts["final-eval-loss-total"]["series"][0]["y"] == [1e-09, 1.00001e-09, 1.00002e-09, 1.00003e-09]


def test_of_many_values_the_ends_are_told(tmp_path: Path):
    for i in range(14):
        write_run(tmp_path / str(i), config_of(seed=i, logging={"swept": {"seed": i}}))
    assert "<dd>14 values from 0 to 13</dd>" in write_report(tmp_path).read_text()


def test_the_best_job_of_a_search_is_marked(search: Path):
    page = write_report(search).read_text()
    assert "best: job 2, loss/total 1.00002e-09</p>" in page
    assert re.findall(r'<tr class="best">\s*<th[^>]*>(\d) <b>best</b>', page) == ["2"]
    charts = {chart["id"]: chart for chart in payload_of(page)["charts"]}
    strong = [s["name"] for s in charts["jobs-eval-loss-total"]["series"] if s["strong"]]
    assert len(strong) == 1 and strong[0].startswith("2 (best): ")


@pytest.mark.parametrize("result", [None, "best_value: [", "- 1\n", "solutions: []", "best_value: 0.5"])
def test_no_job_is_called_the_best_where_the_search_did_not_say_which(result: str | None, search: Path):
    (search / "optimization_results.yaml").unlink()
    if result is not None:
        (search / "optimization_results.yaml").write_text(result)
    page = write_report(search).read_text()
    assert "best: job" not in page and '<tr class="best">' not in page


def test_the_page_has_the_share_of_solved_seeds_of_each_setting(sweep: Path):
    page = write_report(sweep).read_text()
    assert "2 of 4 solved</span>" in page and "solved: 2 of 4 (50%, 95 % interval 15% to 85%)" in page
    assert "2 of 2 (100%" in page and "0 of 2 (0%" in page
    charts = {chart["id"]: chart for chart in payload_of(page)["charts"]}
    assert [s["name"] for s in charts["jobs-eval-loss-total"]["series"]][2] == "2: seed 0, coeff 0.5"
    final = charts["final-eval-ci-l0-0-1-total"]
    assert final["x"] == "pd.losses.recon.coeff" and final["ticks"] is None
    assert {s["name"]: (s["x"], s["y"]) for s in final["series"]} == {
        "solved": ([0.1, 0.1], [2.0, 2.0]),
        "NOT solved": ([0.5, 0.5], [4.0, 4.0]),
    }


def test_jobs_without_a_result_are_said_with_their_reason(sweep: Path):
    write_run(sweep / "4", config_of(), ended=False)
    for name, error in (("5", "Error in the config: no."), ("10", "Traceback:\n  line\nValueError: at the end")):
        (sweep / name).mkdir()
        (sweep / name / "error.txt").write_text(error)
    (sweep / "sweep.yaml").write_text("jobs: 12")
    page = write_report(sweep).read_text()
    assert "4 of 7 jobs finished</span>" in page and "5 of 12 jobs have not begun." in page
    assert "Job 4 has not come to its end at step 100." in page
    assert "Job 5 failed: Error in the config: no." in page and "Job 10 failed: ValueError: at the end" in page
    assert page.index("Job 5") < page.index("Job 10")


def test_a_job_leads_to_its_own_report(sweep: Path):
    write_report(sweep / "1_seed=1")
    page = write_report(sweep).read_text()
    assert '<a href="1_seed=1/report.html">1</a>' in page and 'href="0_seed=0/' not in page


def test_a_sweep_of_which_no_job_has_a_run_still_has_a_page(tmp_path: Path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "error.txt").write_text("It failed.")
    page = write_report(tmp_path).read_text()
    assert "0 of 1 jobs finished</span>" in page and "Job 0 failed: It failed." in page
