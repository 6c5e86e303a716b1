"""Lightning callbacks: evaluation, checkpoints, the progress bar, the speed."""

from pdlightning.callbacks.checkpoint import Interrupted, RunCheckpoint
from pdlightning.callbacks.evaluate import Evaluate
from pdlightning.callbacks.progress import StepProgress
from pdlightning.callbacks.throughput import Throughput

__all__ = ["Evaluate", "Interrupted", "RunCheckpoint", "StepProgress", "Throughput"]
