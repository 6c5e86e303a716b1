"""Time and memory of comparing two decompositions of two large sites, from loaded runs to written files.

    python benchmarks/compare.py [--C 5000] [--threads 2]

The sites are 3072 x 768 and 768 x 3072. `copy`: half of the subcomponents of B are those of A in another order with
noise, the rest are others; `random`: all are others; `self`: B is A. Each case has a process of its own; the peak is
its resident memory at most, and in it what imports and decompositions took at the start.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

CASES = ("self", "copy", "random")
SITES = {"c_fc": (768, 3072), "down_proj": (3072, 768)}


def decomposition(C: int, *, seed: int):
    import torch

    from pdlightning.modules import ComponentModel, SharedMLP

    torch.manual_seed(0)
    target = torch.nn.Sequential()
    for name, (d_in, d_out) in SITES.items():
        target.add_module(name, torch.nn.Linear(d_in, d_out))
    sites = dict.fromkeys(SITES, C)
    return ComponentModel(target=target.requires_grad_(False), sites=sites, ci_fn=SharedMLP(hidden=[1]), seed=seed)


def make_alike(a, b) -> None:
    """Half of b becomes a in another order, with noise."""
    import torch

    for name, theirs in b.components.items():
        ours, C = a.components[name], theirs.C
        order = torch.randperm(C)[: C // 2]
        with torch.no_grad():
            theirs.V[:, : C // 2] = ours.V[:, order] + 0.3 * ours.V.std() * torch.randn_like(ours.V[:, order])
            theirs.U[: C // 2] = ours.U[order] + 0.3 * ours.U.std() * torch.randn_like(ours.U[order])


def measure(case: str, C: int, threads: int) -> None:
    """Child process: one line of JSON."""
    import torch

    from pdlightning.analysis.comparison import compare_runs, numbers, total
    from pdlightning.compare import write

    torch.set_num_threads(threads)
    imports = peak()
    a = decomposition(C, seed=0)
    b = a if case == "self" else decomposition(C, seed=1)
    if case == "copy":
        make_alike(a, b)
    made = peak()
    runs = [Loaded(a), Loaded(b)]
    wall, cpu = time.perf_counter(), time.process_time()
    found = dict(compare_runs(*runs, firing=None))  # type: ignore[arg-type]
    lines = {**{site: numbers(row) for site, row in found.items()}, "all": total(list(found.values()))}
    compared = time.perf_counter() - wall
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), found, lines, {})
    seconds = {"compared": compared, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    memory = {"imports": imports, "made": made, "peak": peak()}
    print(json.dumps({**seconds, **memory, "mmcs": lines["all"]["mmcs_a_to_b"], "matching": lines["all"]["matching"]}))


class Loaded:
    """As much of a loaded run as a comparison of all subcomponents reads."""

    def __init__(self, decomposition):
        self.decomposition = decomposition


def peak() -> float:
    """GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--C", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return measure(arguments.child, arguments.C, arguments.threads)
    import torch

    print(f"{date.today()}  {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print(f"C {arguments.C}, {arguments.threads} threads\n")
    print("| case | compare, s | with files, s | CPU s | peak, GB | of it at the start | MMCS | matching |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        command = [sys.executable, __file__, "--C", str(arguments.C), "--threads", str(arguments.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        done = subprocess.run([*command, "--child", case], env=environment, capture_output=True, text=True, check=True)
        m = json.loads(done.stdout.splitlines()[-1])
        cells = [case, *(f"{m[k]:.1f}" for k in ("compared", "wall", "cpu")), f"{m['peak']:.2f}", f"{m['made']:.2f}"]
        print(f"| {' | '.join(cells)} | {m['mmcs']:.4f} | {m['matching']} |", flush=True)


if __name__ == "__main__":
    main()
