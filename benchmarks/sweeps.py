"""What a sweep adds to its runs: seconds of each job beyond its run, one after another and side by side."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ["experiment=tms_5-2", "metric=none", "logging.progress=false"]
"""Without figures, which take longer than a short training."""
CASES = {
    "one after another, 1 thread": (1, ["runtime.threads=1"]),
    "one after another, 2 threads": (1, ["runtime.threads=2"]),
    "2 side by side, 1 thread each": (2, ["runtime.threads=1", "launcher=local", "hydra.launcher.jobs=2"]),
}


def measure(words: list[str], folder: Path, *, jobs: int, seeds: int) -> dict[str, float]:
    command = [sys.executable, "-m", "pdlightning", "-m", *WORDS, f"seed=range({seeds})", *words]
    began = time.perf_counter()
    subprocess.run([*command, f"hydra.sweep.dir={folder}"], check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - began
    summaries = [json.loads(path.read_text()) for path in folder.glob("*/summary.json")]
    runs = sum(summary["seconds"] for summary in summaries)
    training = sum(summary["steps"] / summary["steps_per_second"] for summary in summaries)
    return {
        "wall": wall,
        "run": runs / seeds,
        "training": training / seeds,
        "beyond": (wall * jobs - runs) / seeds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=1, help="the cases take turns")
    arguments = parser.parse_args()
    print(
        "| case | s in all | s a run | of it training and evaluation | s a job beyond its run |\n|---|---|---|---|---|"
    )
    for _ in range(arguments.rounds):
        for name, (jobs, words) in CASES.items():
            with tempfile.TemporaryDirectory() as place:
                steps = f"steps={arguments.steps}"
                row = measure([*words, steps], Path(place) / "sweep", jobs=jobs, seeds=arguments.seeds)
            print(
                f"| {name} | {row['wall']:.0f} | {row['run']:.1f} | {row['training']:.1f} | {row['beyond']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
