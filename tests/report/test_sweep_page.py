"""The page of a sweep: what was swept, which jobs are solved, which have no result and why."""

from __future__ import annotations

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
    assert values["2_seed=0"] == {"seed": "0", "pd.losses.recon.coeff": "0.5"}


def test_what_a_sweep_wrote_into_its_jobs_comes_before_what_differs(tmp_path: Path):
    for i in (0, 1):
        logging = {"swept": {"seed": i}}
        write_run(tmp_path / str(i), config_of(seed=i, steps=100 + i, logging=logging, labels={"size": f"s{i}"}))
    names, values = swept_settings([job.run for job in read_jobs(tmp_path) if job.run])
    assert names == ["seed", "size"] and values["1"] == {"seed": "1", "size": "s1"}


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
