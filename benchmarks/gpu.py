"""Is the step right, and how fast is it, on a GPU: one table. Needs torch, lightning, torchmetrics and jaxtyping.

    python benchmarks/gpu.py --out gpu.jsonl              # within ten minutes on an H100 or H200
    python benchmarks/gpu.py --cases lm lm-64
    python benchmarks/gpu.py --device cpu --small         # does it run at all: in two minutes on a CPU

`agreement` compares losses, ci and gradients of the first steps on the device with float64 on the CPU (TF32 off). All
other rows are timed, each in a process of its own, and their losses of the first steps compared with those of the first
row of the case. FLOPs are counted on the eager step; utilisation is of the dense peak of the card in that precision.
What fails says why in its row, and the rest goes on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import platform
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import date
from functools import partial
from typing import Any

import torch

Row = dict[str, Any]
AGREEING = ("tms_5-2", "resid_mlp3", "lm")
TIMED = {
    "tms_5-2": [("fp32", "eager"), ("fp32", "compiled"), ("fp32", "graphs"), ("bf16", "eager")],
    "lm": [
        ("fp32", "eager"),
        ("bf16", "compiled"),
        ("bf16", "eager"),
        ("bf16", "checkpointed"),
        ("tf32", "eager"),
        ("fp32", "compiled"),
    ],
    "lm-64": [("bf16", "eager"), ("bf16", "compiled")],
    "resid_mlp3": [("fp32", "eager"), ("fp32", "compiled"), ("fp32", "graphs"), ("bf16", "eager")],
}
"""(precision, mode) of the rows of each case. `lm` is the 4-layer language model with a batch of 8 x 512, `lm-64` of
64 x 512 tokens. With `twice` the blocks of the ci function are computed again in the backward, and of a compiled step
more than these; `graphs` is torch.compile with mode="reduce-overhead", that is CUDA graphs."""
NOT_ON_CPU = {
    "tms_5-2": {("fp32", "graphs")},
    "lm": {("tf32", "eager"), ("bf16", "compiled"), ("bf16", "compiled, twice"), ("fp32", "compiled")},
    "lm-64": {("bf16", "compiled")},
    "resid_mlp3": {("fp32", "compiled"), ("fp32", "graphs")},
}
"""What a CPU does not have, or would compile for minutes."""
PEAKS = {"fp32": 67, "tf32": 495, "bf16": 989}
"""Dense TFLOP/s of an H100 or H200 (SXM) by its data sheet."""
TOLERANCES = {"losses": 1e-4, "ci": 1e-4, "gradients": 5e-3}
"""Of `agreement`, relative, by norms. Gradients: a ci that rounding puts on the other side of 0 has another slope."""
LOSS_TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
"""Of the losses of a timed row, relative."""
COLUMNS = {
    "case": 10, "variant": 34, "ms": 8, "steps/s": 8, "peak GB": 7, "TFLOP/s": 7, "of peak": 7, "difference": 10,
    "verdict": 7,
}  # fmt: skip
"""Of the table, and their widths."""
LONGEST = 240
"""Seconds that one row may take."""


def work(send: Any, function: str, arguments: dict[str, Any]) -> None:
    """In a process of its own: what a function of `gpu_cases` returns, or why it failed."""
    try:
        result = getattr(importlib.import_module("gpu_cases"), function)(**arguments)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or ["without a message"]
        reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
        result = {"failed": f"{reason}: {lines[0][:160]}", "traceback": traceback.format_exc()}
    send.send(result)


class Processes:
    """Runs functions of `gpu_cases` one after another, each in a fresh process, until the time is up."""

    def __init__(self, device: str, seconds: float):
        # What was imported may be shared by a fork, but not by one that has seen CUDA.
        self.context: Any = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
        if device == "cpu":
            self.context.set_forkserver_preload(["pdlightning.decomposition"])
        self.end = time.monotonic() + seconds

    def run(self, function: str, **arguments: Any) -> Any:
        left = min(LONGEST, self.end - time.monotonic())
        if left <= 0:
            return {"failed": "not begun: no time left, see --seconds and --cases"}
        receive, send = self.context.Pipe(duplex=False)
        process = self.context.Process(target=work, args=(send, function, arguments))
        process.start()
        send.close()
        try:
            if not receive.poll(left):
                return {"failed": f"not done after {left:.0f} s"}
            result = receive.recv()
            process.join(10)  # a compiler has processes of its own to end
            return result
        except EOFError:
            process.join()
            return {"failed": f"its process ended with {process.exitcode} (negative: the number of a signal)"}
        finally:
            process.kill()
            process.join()


def loss_difference(found: list[dict[str, float]], reference: list[dict[str, float]]) -> float:
    """The greatest relative difference; nan where a loss is not finite."""
    ratios = [
        abs(mine[name] - value) / abs(value)
        for mine, theirs in zip(found, reference, strict=True)
        for name, value in theirs.items()
    ]
    return max(ratios) if all(math.isfinite(ratio) for ratio in ratios) else math.nan


def agreement_rows(processes: Processes, *, device: str, small: bool) -> Iterator[Row]:
    for case in AGREEING:
        result = processes.run("agreement", case=case, device=device, small=small)
        if isinstance(result, dict):
            yield {"case": "agreement", "variant": case, **result}
            continue
        for row in result:
            differences = row["differences"]
            wrong = [what for what, value in differences.items() if not value <= TOLERANCES[what]]
            yield {
                "case": "agreement",
                "variant": f"{case}, {row['variant']}",
                "difference": max(differences.values()),
                "verdict": f"WRONG: {', '.join(wrong)}" if wrong else "ok",
                **differences,
            }


def timed_rows(processes: Processes, case: str, eager: dict[str, Row], *, device: str, small: bool) -> Iterator[Row]:
    """The rows of a case; the FLOPs of the first eager step are kept in `eager`, under the case without its batch."""
    reference = None
    for precision, mode in TIMED[case]:
        if device == "cpu" and (precision, mode) in NOT_ON_CPU[case]:
            continue
        begin = time.monotonic()
        result = processes.run("measure", case=case, precision=precision, mode=mode, device=device, small=small)
        seconds = time.monotonic() - begin  # building and compiling included
        row = {"case": case, "variant": f"{precision}, {mode}", **result, "seconds": seconds}
        if "failed" in row:
            yield row
            continue
        if mode == "eager":
            eager.setdefault(case.removesuffix("-64"), row)
        row["steps_per_second"] = 1e3 / row["ms"]
        if (counted := eager.get(case.removesuffix("-64"))) is not None:
            row["tflops_per_second"] = flops(counted, row["samples"]) / row["ms"] / 1e9
        if reference is None:
            reference, row["verdict"] = row["losses"], "the reference"
        else:
            row["difference"] = loss_difference(row["losses"], reference)
            row["verdict"] = "ok" if row["difference"] <= LOSS_TOLERANCES[precision] else "WRONG: losses"
        if device == "cuda":
            if "tflops_per_second" in row and any(name in torch.cuda.get_device_name() for name in ("H100", "H200")):
                row["of_peak"] = row["tflops_per_second"] / PEAKS[precision]
            if waits := row["host_waits"]:
                row["verdict"] += f"; the host waits {len(waits)} times a step, first at {waits[0]}"
        yield row


def flops(counted: Row, samples: int) -> float:
    """Of a step with so many samples: what was counted grows with them, but for the products of weights alone."""
    fixed = counted["flops_of_weights"]
    return fixed + (counted["flops"] - fixed) * samples / counted["samples"]


def cells(row: Row) -> list[str]:
    def number(key: str, form: str) -> str:
        return "" if row.get(key) is None else format(row[key], form)

    return [
        row["case"],
        row["variant"],
        number("ms", ".2f"),
        number("steps_per_second", ".1f"),
        number("gb", ".2f"),
        number("tflops_per_second", ".3g"),
        number("of_peak", ".1%"),
        number("difference", ".1e"),
        row["failed"] if "failed" in row else row["verdict"],
    ]


def line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.ljust(width) for text, width in zip(texts, COLUMNS.values(), strict=True)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--cases", nargs="+", choices=["agreement", *TIMED], default=["agreement", *TIMED])
    parser.add_argument("--small", action="store_true", help="toy shapes, to see that it runs; its times mean nothing")
    parser.add_argument("--seconds", type=float, default=570, help="of all rows together; those left over say so")
    parser.add_argument(
        "--out", help="file to which every row is added as a line of JSON, with what the table leaves out"
    )
    arguments = parser.parse_args()
    device, small = arguments.device, arguments.small
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here: --device cpu --small only tries the program out.")
    if device == "cpu" and not small:
        sys.exit("The shapes of a GPU would take a CPU hours: add --small.")
    machine = {
        "date": str(date.today()),
        "card": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "small": small,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()) + "\n")
    print(line(list(COLUMNS)) + "\n|" + "---|" * len(COLUMNS), flush=True)
    processes, eager, bad = Processes(device, arguments.seconds), {}, 0
    for case in arguments.cases:
        make_rows = agreement_rows if case == "agreement" else partial(timed_rows, case=case, eager=eager)
        for row in make_rows(processes, device=device, small=small):
            print(line(cells(row)), flush=True)
            bad += "failed" in row or row["verdict"].startswith("WRONG")
            if arguments.out:
                with open(arguments.out, "a") as file:
                    file.write(json.dumps({**machine, **row}) + "\n")
    if bad:
        sys.exit(
            f"\n{bad} rows are wrong or failed" + (f": their tracebacks are in {arguments.out}" * bool(arguments.out))
        )


if __name__ == "__main__":
    main()
