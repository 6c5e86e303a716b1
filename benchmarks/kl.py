"""Peak memory and one-thread CPU time of the KL of logits, forward and backward: the plain formula, torch's and ours.

    python benchmarks/kl.py [--rounds 5]

Every measurement has a process of its own. Memory is what the process held at most beyond the two logits and its
imports, in units of one of the logits; 1.0 is the gradient alone. CPU time is a median.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from datetime import date

CASES = [(1024, 4096, "float32"), (512, 50257, "float32"), (2048, 50257, "bfloat16")]
"""(positions, vocabulary, type of the logits)"""


def plain(clean, masked):
    log_p = clean.log_softmax(-1)
    return (log_p.exp() * (log_p - masked.log_softmax(-1))).sum() / len(clean)


def kl_div(clean, masked):
    from torch.nn.functional import kl_div

    elements = kl_div(masked.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="none")
    return elements.sum(-1).mean()


def ours(clean, masked):
    from pdlightning.functional import kl_divergence

    return kl_divergence(clean, masked)


def compiled(clean, masked):
    import torch

    return torch.compile(ours, fullgraph=True)(clean, masked)


VARIANTS = {"plain formula": plain, "F.kl_div, no reduction": kl_div, "ours": ours, "ours, compiled": compiled}


def measure(variant: str, positions: int, vocab: int, dtype: str, rounds: int) -> None:
    """Child process: one line of JSON."""
    import torch

    torch.set_num_threads(1)
    generator, function = torch.Generator().manual_seed(0), VARIANTS[variant]

    def logits(rows=positions):
        return torch.randn(rows, vocab, generator=generator, dtype=getattr(torch, dtype))

    def forward_and_backward():
        begin = time.process_time()
        torch.autograd.grad(function(clean, masked), masked)
        return time.process_time() - begin

    # What is made once does not count: imports, and the compiler's code, which is for one shape.
    warm_up = positions if variant == "ours, compiled" else 1
    clean, masked = logits(warm_up), logits(warm_up).requires_grad_()
    forward_and_backward()
    clean, masked = logits(), logits().requires_grad_()
    peak = peak_of(forward_and_backward)
    seconds = statistics.median(forward_and_backward() for _ in range(rounds))
    print(json.dumps({"copies": peak / (clean.numel() * clean.element_size()), "ms": 1e3 * seconds}))


def peak_of(function) -> int:
    """Bytes held at most beyond what is held before."""
    import ctypes

    ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux forgets the highest mark, which the imports or the compiler may have set
    except OSError:
        pass
    before = resident()
    function()
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, 0)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        variant, positions, vocab, dtype = arguments.child
        return measure(variant, int(positions), int(vocab), dtype, arguments.rounds)
    import torch

    print(f"{date.today()}  {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    print("| positions x vocabulary | variant | peak, in logits | CPU ms | x CPU |\n|---|---|---|---|---|")
    for positions, vocab, dtype in CASES:
        yardstick = None
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--rounds", str(arguments.rounds)]
            command += ["--child", variant, str(positions), str(vocab), dtype]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            line = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            found = json.loads(line.splitlines()[-1])
            yardstick = yardstick or found["ms"]
            case = f"{positions} x {vocab} {dtype}"
            ratio = yardstick / found["ms"]
            print(f"| {case} | {variant} | {found['copies']:.2f} | {found['ms']:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
