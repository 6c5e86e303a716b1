"""Lightning callbacks: evaluation, checkpoints, the progress bar."""

from pdlightning.callbacks.checkpoint import Interrupted, RunCheckpoint
from pdlightning.callbacks.evaluate import Evaluate
from pdlightning.callbacks.progress import StepProgress

__all__ = ["Evaluate", "Interrupted", "RunCheckpoint", "StepProgress"]
