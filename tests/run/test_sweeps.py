"""Sweeps as a user starts them: what is refused, what a job is called, what fails alone, and what goes on."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from pdlightning.__main__ import CONF, main
from pdlightning.catalogue import find_runs

BARE = [
    "experiment=tms_5-2", "debug=fast", "metric=none", "~metric.slow.pgd_ladder", "pd.sites.linear1=6",
    "pd.sites.linear2=6", "data.batch_size=8", "runtime.threads=1", "runtime.keep_memory=false",
]  # fmt: skip
Command = Callable[..., str]


@pytest.fixture
def command(
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Command:
    """What the command prints and logs, and the message it ends with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("PDLIGHTNING_CACHE", str(cache))

    def said(*words: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["pdlightning", *words])
        caplog.clear()
        ending = ""
        try:
            main()
        except SystemExit as end:
            ending = str(end.code)
        printed = capsys.readouterr()
        return printed.out + printed.err + caplog.text + ending

    return said


def timeless(sweep: Path) -> list[dict[str, str]]:
    """The table of a sweep but for the times."""
    with (sweep / "runs.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def start(words: list[str], place: Path, cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PDLIGHTNING_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-m", "pdlightning", *words], cwd=place, env=environment, text=True, stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def wait_for(pattern: str, place: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(place.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)[0][-3000:]
        time.sleep(0.05)


def test_an_interrupted_sweep_goes_on_and_ends_in_the_same_table(tmp_path: Path, command: Command):
    words = ["-m", *BARE, "seed=3,4", "loss.importance_minimality.beta=10,100", "+labels.kind=new"]
    command(*words, "hydra.sweep.dir=whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    one, two, three = (
        tmp_path / "cut" / name for name in ("1_seed=3_beta=100", "2_seed=4_beta=10", "3_seed=4_beta=100")
    )
    (one / "summary.json").unlink()  # half done
    (one / "checkpoints" / "step=6.ckpt").unlink()
    (two / "summary.json").unlink()  # failed before its first checkpoint
    shutil.rmtree(two / "checkpoints")
    (two / "error.txt").write_text("the machine was out of memory\n")
    shutil.rmtree(three)  # not begun
    (tmp_path / "cut" / "runs.csv").unlink()
    untouched = (tmp_path / "cut" / "0_seed=3_beta=10" / "summary.json").stat().st_mtime_ns

    said = command("resume=cut")
    assert "Job 1 of 4: seed=3,beta=10 has finished before." in said and "from step 3" in said
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole") != []
    assert (tmp_path / "cut" / "0_seed=3_beta=10" / "summary.json").stat().st_mtime_ns == untouched
    assert not (two / "error.txt").exists() and (three / "decomposition").is_dir()
    again = command("resume=cut")
    assert again.count("has finished before") == 4 and timeless(tmp_path / "cut") == timeless(tmp_path / "whole")


def test_a_job_is_named_by_what_was_swept_and_labelled(tmp_path: Path, command: Command):
    words = ["seed=3", "ci_fn=shared_mlp,vector_mlp", "labels={size: medium}", "logging.tags=[mine]"]
    said = command("-m", *BARE, *words, "hydra.sweep.dir=named")
    folder = tmp_path / "named" / "1_ci_fn=vector_mlp"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["name"], summary["swept"]) == ("ci_fn=vector_mlp", {"ci_fn": "vector_mlp"})
    assert (summary["tags"], summary["labels"]) == (["mine", "ci_fn=vector_mlp", "size=medium"], {"size": "medium"})
    logging = yaml.safe_load((folder / "config.yaml").read_text())["logging"]
    assert (logging["run_name"], logging["group"]) == ("ci_fn=vector_mlp", "named")
    assert "ci_fn=shared_mlp: solved: 0 of 1" not in said  # no two jobs of a kind
    header = next(line for line in said.splitlines() if line.startswith("  run "))
    assert header.split()[:4] == ["run", "state", "ci_fn", "size"]


def test_a_failing_job_fails_alone_and_is_tried_again(tmp_path: Path, command: Command):
    said = command("-m", *BARE, "pd.sites.linear1=0,6", "hydra.sweep.dir=sweep")
    reason = "Error in the config: sites['linear1']: C, the number of subcomponents, must be"
    assert f"Job 1 of 2: linear1=0 failed: {reason}" in said and f"  0_linear1=0: {reason}" in said
    assert "solved: 0 of 1 (0%, 95 % interval 0% to 79%)" in said and said.endswith("resume=sweep")
    again = command("resume=sweep")
    assert reason in again and "Job 2 of 2: linear1=6 has finished before." in again
    assert [run.state for run in find_runs([tmp_path / "sweep"])] == ["broken", "finished"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=1,1"], "seed=1 is there twice, so two jobs would be the same"),
        (["loss.importance_minimality.beta=10,1e1"], "beta=10.0 is there twice"),
        (["sed=1,2"], "there is no 'sed' at the top level; did you mean 'seed'?"),
        (["loss.importance_minimality.beat=1,2"], "did you mean 'beta'?"),
        (["seed=1,two"], "The job seed=two: seed: expected int, got 'two'"),
        (["ci_fn=shared_mlp,shared_mpl"], "ci_fn=shared_mpl: there is no such ci_fn; did you mean 'shared_mlp'?"),
        (["labels=medium", "seed=1,2"], "labels: expected dict[str, str | int | float | bool] | None, got 'medium'"),
        (["seed=interval(1,2)"], "search in it with sweep=search"),
        (["sweep=sedes"], "did you mean 'seeds'?"),
        (["launcher=local", "hydra.launcher.jobs=0", "seed=1,2"], "hydra.launcher.jobs must be at least 1, got 0"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_its_first_job(
    words: list[str], message: str, tmp_path: Path, command: Command
):
    said = command("-m", *BARE, *words, "hydra.sweep.dir=sweep")
    assert message in said and "Traceback" not in said and "Warning" not in said, said
    assert not (tmp_path / "sweep").exists()


def test_what_continues_a_sweep_must_be_that_sweep(tmp_path: Path, command: Command):
    sweep = tmp_path / "outputs" / "tms_5-2" / "first"
    sweep.mkdir(parents=True)
    record = {"arguments": ["-m", *BARE, "seed=1,2"], "started_in": str(tmp_path), "swept": ["seed"], "jobs": 2}
    (sweep / "sweep.yaml").write_text(yaml.safe_dump(record))
    here = f"hydra.sweep.dir={sweep}"
    assert "already holds a sweep. Go on with it by resume=" in command("-m", *BARE, "seed=1,2", here)
    assert "holds another sweep (" in command("-m", *BARE, "seed=1,3", here, "resume=auto")
    assert "takes nothing else but" in command(f"resume={sweep}", "seed=1,3")
    assert "is not the folder of a run or of a sweep" in command(f"resume={tmp_path}")
    with FileLock(sweep / ".running"):
        assert "is a sweep that is going on in another process" in command(f"resume={sweep}")
    (sweep / "sweep.yaml").write_text("jobs: 2\n")
    assert "sweep.yaml is damaged" in command(f"resume={sweep}")


def test_auto_finds_the_unfinished_sweep_of_the_same_words(tmp_path: Path, command: Command):
    words = ["-m", *BARE, "seed=1,2", "resume=auto"]
    command(*words)
    (sweep,) = tmp_path.glob("outputs/tms_5-2/*_sweep")
    shutil.rmtree(sweep / "1_seed=2")
    said = command(*words, "runtime.keep_memory=true")
    assert "Job 1 of 2: seed=1 has finished before." in said and list(tmp_path.glob("outputs/tms_5-2/*")) == [sweep]
    assert (sweep / "1_seed=2" / "summary.json").is_file()


def test_a_job_in_the_hands_of_another_process_is_left_alone(tmp_path: Path, command: Command):
    command("-m", *BARE, "seed=1,2", "hydra.sweep.dir=sweep")
    job = tmp_path / "sweep" / "0_seed=1"
    (job / "summary.json").unlink()
    before = {path.name for path in job.iterdir()}
    with FileLock(job / ".running"):
        said = command("resume=sweep")
    assert "another process works in" in said and before <= {path.name for path in job.iterdir()}


@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
def test_every_preset_is_explained_and_refuses_nothing_of_its_own(preset: str, tmp_path: Path, command: Command):
    text = (CONF / "sweep" / f"{preset}.yaml").read_text()
    assert f"sweep={preset}" in text.partition("hydra:")[0]
    where = [] if preset == "recipes" else ["experiment=resid_mlp1"]
    said = command("-m", *where, f"sweep={preset}", "seed=-1", "steps=0", "hydra.sweep.dir=sweep")
    assert "The job" in said and "steps must be at least 1, got 0" in said, said  # composed, and then refused


@pytest.mark.timeout(240)
def test_jobs_side_by_side_die_alone_stop_together_and_go_on(tmp_path: Path, cache: Path, command: Command):
    slow = ["steps=150", "logging.checkpoint_every=5", "logging.eval_every=150", "logging.slow_eval_every=150"]
    local = ["launcher=local", "hydra.launcher.jobs=2"]
    words = ["-m", *BARE, *slow, "seed=range(3)"]
    process = start([*words, *local, "hydra.sweep.dir=beside"], tmp_path, cache)
    wait_for("beside/[01]_*/checkpoints/step=5.ckpt", tmp_path, process)
    ours = ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)]
    children = subprocess.run(ours, capture_output=True, text=True).stdout.splitlines()
    workers = [int(line.split()[0]) for line in children if "pdlightning.launching.local" in line]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    wait_for("beside/2_*/checkpoints/*.ckpt", tmp_path, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and f"resume={tmp_path / 'beside'}" in said, said
    assert "failed: Its process ended by signal 9 (SIGKILL)" in said
    states = {run.state for run in find_runs([tmp_path / "beside"])}
    assert "running" not in states and "broken" in states
    assert "Decomposing tms_5-2" in (tmp_path / "beside" / "2_seed=2" / "log.txt").read_text()
    command("resume=beside")
    command(*words, "hydra.sweep.dir=one_by_one")
    assert timeless(tmp_path / "beside") == timeless(tmp_path / "one_by_one") != []


@pytest.mark.timeout(120)
def test_jobs_end_with_the_process_that_started_them(tmp_path: Path, cache: Path):
    process = start(["-m", *BARE, "steps=100000", "seed=1,2", "launcher=local", "hydra.sweep.dir=s"], tmp_path, cache)
    wait_for("s/*/checkpoints/*.ckpt", tmp_path, process)
    process.kill()
    process.wait()
    time.sleep(1.0)
    assert {run.state for run in find_runs([tmp_path / "s"])} == {"unfinished"}


def test_a_search_learns_from_failures_and_goes_on_where_it_was(tmp_path: Path, command: Command):
    pytest.importorskip("optuna", reason="pip install 'pdlightning[optuna]'")
    rest = [word for word in BARE if "linear1" not in word]
    words = ["-m", *rest, "sweep=search", "pd.sites.linear1=0,6,8", "hydra.sweeper.n_trials=5"]
    said = command(*words, "hydra.sweep.dir=whole")
    runs = find_runs([tmp_path / "whole"])
    finished = [run for run in runs if run.state == "finished"]
    assert len(runs) == 5 and 0 < len(finished) < 5, (
        "the seed of the sampler should give 0 and another value of linear1"
    )
    best = min(finished, key=lambda run: run.metrics["eval/loss/total"])
    assert f"best eval/loss/total, {best.metrics['eval/loss/total']:.4g}: whole/{best.folder.name}" in said
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for run in find_runs([tmp_path / "cut"])[3:]:
        shutil.rmtree(run.folder)
    assert "has finished before" in command("resume=cut")
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("launcher", [[], ["launcher=local", "hydra.launcher.jobs=2"]], ids=["in_turn", "beside"])
def test_twenty_jobs_killed_three_times_give_the_table_of_an_undisturbed_sweep(
    tmp_path: Path, cache: Path, launcher: list[str]
):
    words = ["-m", *BARE, "steps=150", "logging.checkpoint_every=10", "logging.eval_every=50",
             "logging.slow_eval_every=150", "seed=range(20)", *launcher]  # fmt: skip
    whole = start([*words, "hydra.sweep.dir=whole"], tmp_path, cache)
    assert whole.communicate()[0] and whole.returncode == 0
    process = start([*words, "hydra.sweep.dir=cut"], tmp_path, cache)
    for job in (3, 9, 15):
        wait_for(f"cut/{job}_*/checkpoints/*.ckpt", tmp_path, process)
        process.kill()
        process.communicate()
        process = start(["resume=cut"], tmp_path, cache)
    process.communicate()
    assert process.returncode == 0
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")


def test_what_a_stranger_might_find_in_a_job_folder_is_not_removed(tmp_path: Path, command: Command):
    command("-m", *BARE, "seed=1,2", "hydra.sweep.dir=sweep")
    shutil.rmtree(tmp_path / "sweep" / "1_seed=2")
    shutil.copytree(tmp_path / "sweep" / "0_seed=1", tmp_path / "sweep" / "1_seed=2")  # a run of another seed
    said = command("resume=sweep")
    assert "holds a run of other settings than this job's" in said
    assert (tmp_path / "sweep" / "1_seed=2" / "decomposition").is_dir()
