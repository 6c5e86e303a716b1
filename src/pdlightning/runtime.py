"""Where and how a run computes: nothing here changes what is computed (spec D1, class `runtime`)."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def prepare_runtime(runtime: dict[str, Any]) -> None:
    """Threads and allocator of this process."""
    if runtime["threads"] is not None:
        torch.set_num_threads(runtime["threads"])
    if runtime["keep_memory"] and sys.platform == "linux":
        keep_freed_memory()


def mixed_precision(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """What the Trainer's setting does around a forward, where there is no Trainer."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def keep_freed_memory() -> None:
    """Tell glibc to keep big freed blocks instead of giving them back to the system.

    Every temporary of a few megabytes would otherwise be mapped, page by page, and unmapped again: about a third of a
    toy step. Does nothing where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_TOP_PAD, 1 << 28)
