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
import sys
import time
import traceback
from datetime import date
from typing import Any

import torch

CASES = {
    "agreement": [("tms_5-2",), ("resid_mlp3",), ("lm",)],
    "tms_5-2": [("fp32", "eager"), ("fp32", "compiled"), ("fp32", "graphs"), ("bf16", "eager"), ("bf16", "graphs")],
    "lm": [("fp32", "eager"), ("tf32", "eager"), ("bf16", "eager"), ("bf16", "compiled"), ("fp32", "compiled")],
    "lm-64": [("bf16", "eager"), ("bf16", "compiled")],
    "resid_mlp3": [("fp32", "eager"), ("fp32", "compiled"), ("fp32", "graphs"), ("bf16", "eager"), ("bf16", "compiled")],
}
"""What there is of each case; `lm` is the 4-layer language model with a batch of 8 x 512 tokens, `lm-64` of 64 x 512."""
PEAKS = {"fp32": 67e12, "tf32": 495e12, "bf16": 989e12}
"""Dense FLOP/s of an H100 or H200 (SXM) by its data sheet."""
TOLERANCES = {"losses": 1e-4, "ci": 1e-4, "gradients": 1e-3}
"""Of `agreement`, relative to the greatest number of a tensor."""
LOSS_TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
"""Of the losses of a timed row, relative."""
COLUMNS = ("case", "variant", "ms", "steps/s", "peak GB", "TFLOP/s", "of peak", "difference", "verdict")
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
        self.context = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
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
            return receive.recv() if receive.poll(left) else {"failed": f"not done after {left:.0f} s"}
        except EOFError:
            process.join()
            return {"failed": f"its process ended with {process.exitcode} (negative: the number of a signal)"}
        finally:
            process.kill()
            process.join()


def loss_difference(found: list[dict[str, float]], reference: list[dict[str, float]]) -> float:
    """The greatest relative difference; nan where a loss is not finite."""
    ratios = [
        abs(mine[name] - value) / abs(value) for mine, its in zip(found, reference, strict=True) for name, value in its.items()
    ]
    return max(ratios) if all(math.isfinite(ratio) for ratio in ratios) else math.nan


def agreement_rows(processes: Processes, *, device: str, small: bool):
    for (step,) in CASES["agreement"]:
        result = processes.run("agreement", case=step, device=device, small=small)
        if isinstance(result, dict):
            yield {"case": "agreement", "variant": step, **result}
            continue
        for row in result:
            wrong = [what for what, value in row["differences"].items() if not value <= TOLERANCES[what]]
            yield {
                "case": "agreement",
                "variant": f"{step}, {row['variant']}",
                "difference": max(row["differences"].values()),
                "verdict": f"WRONG: {', '.join(wrong)}" if wrong else "ok",
                **row["differences"],
            }


def timed_rows(processes: Processes, case: str, known: dict[str, Any], *, device: str, small: bool, peaks: dict[str, float]):
    """`known` gathers the eager results, whose FLOPs serve a case with more samples too."""
    reference = None
    for precision, mode in variants(case, device=device, small=small):
        result = processes.run("measure", case=case, precision=precision, mode=mode, device=device, small=small)
        row = {"case": case, "variant": f"{precision}, {mode}", **result}
        if "failed" in result:
            yield row
            continue
        if mode == "eager":
            known.setdefault(case, result)
        row["steps/s"] = 1e3 / result["ms"]
        flops = flops_of(case, known)
        if flops is not None:
            row["tflops_per_second"] = flops / result["ms"] / 1e9
            row["of_peak"] = row["tflops_per_second"] * 1e12 / peaks[precision] if peaks else None
        if reference is None:
            reference, row["verdict"] = result["losses"], "the reference"
        else:
            row["difference"] = loss_difference(result["losses"], reference)
            row["verdict"] = "ok" if row["difference"] <= LOSS_TOLERANCES[precision] else "WRONG: losses"
        if waits := result.get("host_waits"):
            row["verdict"] += f"; the host waits {len(waits)} times a step, first at {waits[0]}"
        yield row
