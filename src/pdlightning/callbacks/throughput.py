"""How fast a training is, and how much of the device it uses."""

from __future__ import annotations

import re
import sys
import time
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor
from torch.utils import _pytree as pytree

from pdlightning.callbacks.checkpoint import RunCheckpoint
from pdlightning.callbacks.evaluate import Evaluate
from pdlightning.decomposition import ParameterDecomposition
from pdlightning.modules.batches import token_ids
from pdlightning.rehearsal.dry import DryDecomposition, NotCountable

PEAKS: dict[str, tuple[float, float, float]] = {
    "B200": (2250, 1125, 75),
    "GH200": (989, 495, 67),
    "H200": (989, 495, 67),
    "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835, 418, 60),
    "H100": (989, 495, 67),
    "A100": (312, 156, 19.5),
    "L40S": (362, 183, 91.6),
    "L4": (121, 60, 30.3),
    "A10G": (70, 35, 31.2),
    "A10": (125, 62.5, 31.2),
    "RTX A6000": (155, 77.4, 38.7),
    "RTX 4090": (165, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
}
"""Card -> peak TFLOP/s of dense products in 16 bits, in TF32, and in float32 without tensor cores, by its maker."""


class Throughput(Callback):
    """Logs the speed since the last log, when the training logs; no other step makes the host wait for the device.

    `throughput/steps_per_second`, `samples_per_second` and, where batches are of tokens, `tokens_per_second`, of all
    ranks together; `peak_memory_gb` in 10^9 bytes, the most since the process started that torch had in use on the GPU,
    or that the process held in RAM, evaluation included; `tflops_per_second`, of one device, by the FLOPs of an eager
    step (`dry.StepCost`: counted on a copy without numbers, so that a compiled step has them too); and `mfu`, these as
    a fraction of the peak of the device, where that is known.

    The first step is left out, since it may compile, and so are evaluations and checkpoints with the batch fetched
    after them: there the clock stands still, and the device is waited for. It comes before them among the callbacks.

    `flops` of a step of one rank are counted at the first batch where nobody has set them before.
    """

    def __init__(self) -> None:
        self.flops: int | None = None
        self.peak: float | None = None
        self.dry: DryDecomposition | None = None
        self.started: float | None = None
        self.seconds, self.batches, self.step = 0.0, -1, 0

    def setup(self, trainer: Trainer, pl_module: ParameterDecomposition, stage: str) -> None:  # type: ignore[override]
        """Copy the module while its parameters are whole: a strategy may shard them later."""
        if stage == "fit" and self.flops is None:
            try:
                self.dry = DryDecomposition(pl_module, precision=str(trainer.precision))
            except NotCountable as error:
                leave_out("tflops_per_second and mfu", f"FLOPs cannot be counted: {error}")

    def on_train_start(self, trainer: Trainer, pl_module: ParameterDecomposition) -> None:  # type: ignore[override]
        self.started, self.seconds, self.batches, self.step = None, 0.0, -1, trainer.global_step

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: ParameterDecomposition, batch: Any, batch_idx: int
    ) -> None:
        if self.batches < 0:
            self.count_flops(batch)
            if self.flops is not None:
                self.peak = peak_of(pl_module.device, str(trainer.precision))
        elif self.started is None:
            self.started = time.perf_counter()

    def count_flops(self, batch: Any) -> None:
        if self.dry is None:
            return
        try:
            self.flops = self.dry.cost(batch).flops
        except NotCountable as error:
            leave_out("tflops_per_second and mfu", f"FLOPs cannot be counted: {error}")
        self.dry = None

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: ParameterDecomposition, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        step, taken = trainer.global_step, trainer.global_step != self.step  # an accumulated batch takes none
        self.step = step
        log_now = taken and step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if self.batches == 0 or log_now:
            self.read_clock(pl_module.device)
        if log_now and self.seconds > 0:
            self.report(trainer, pl_module, batch)
        if taken and held_up(trainer, step):
            self.stop_clock(pl_module.device)

    def on_validation_start(self, trainer: Trainer, pl_module: ParameterDecomposition) -> None:  # type: ignore[override]
        self.stop_clock(pl_module.device)

    def on_save_checkpoint(  # type: ignore[override]
        self, trainer: Trainer, pl_module: ParameterDecomposition, checkpoint: dict[str, Any]
    ) -> None:
        self.stop_clock(pl_module.device)

    def read_clock(self, device: torch.device) -> None:
        """Add the time since the last look, with that of the work which the device still had to do."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        self.seconds += 0.0 if self.started is None else now - self.started
        self.started = now

    def stop_clock(self, device: torch.device) -> None:
        """Until the next batch."""
        if self.started is not None:
            self.read_clock(device)
            self.started = None

    def report(self, trainer: Trainer, pl_module: ParameterDecomposition, batch: Any) -> None:
        rate, ranks = self.batches / self.seconds, trainer.world_size
        self.seconds, self.batches = 0.0, 0
        values = {
            "steps_per_second": rate / trainer.accumulate_grad_batches,
            "samples_per_second": rate * ranks * samples_in(batch),
            "peak_memory_gb": peak_memory(pl_module.device) / 1e9,
        }
        if (tokens := token_ids(batch)) is not None:
            values["tokens_per_second"] = rate * ranks * tokens.numel()
        if self.flops is not None:
            values["tflops_per_second"] = rate * self.flops / 1e12
            if self.peak is not None:
                values["mfu"] = rate * self.flops / self.peak
        for logger in trainer.loggers:
            logger.log_metrics({f"throughput/{name}": value for name, value in values.items()}, step=self.step)


def held_up(trainer: Trainer, step: int) -> bool:
    """Whether an evaluation or a checkpoint of ours comes after this step."""
    return any(isinstance(c, Evaluate | RunCheckpoint) and step % c.every == 0 for c in trainer.callbacks)  # type: ignore[attr-defined]


def samples_in(batch: Any) -> int:
    """The length of the first tensor of a batch."""
    return next((len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def peak_memory(device: torch.device) -> int:
    """Bytes; no device is waited for."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of(device: torch.device, precision: str) -> float | None:
    """FLOP/s of the products that this precision makes on this device; None, with a word, where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [peaks for card, peaks in PEAKS.items() if re.search(rf"\b{card}\b", name)]
    if not known or precision == "64-true":
        leave_out("mfu", f"no peak is known of {name!r} with precision {precision}.")
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return known[0][0 if "16" in precision else 1 if tf32 else 2] * 1e12


def leave_out(what: str, reason: object) -> None:
    rank_zero_info(f"Left out of what is logged as throughput/: {what}, since {reason}")
