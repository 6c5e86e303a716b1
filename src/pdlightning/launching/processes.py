"""Processes that we start: what they may use, how a signal reaches them, and how they ended."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CORES = "PDLIGHTNING_CORES"
"""In the environment of jobs that run side by side: how many cores each may use."""
LAST_LINES = 20


def cores() -> int:
    """How many cores this process may use."""
    if CORES in os.environ:
        return int(os.environ[CORES])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def forwarded_signals(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """The first Ctrl-C (or other signal) reaches every process, which ends after its step; the second kills them.

    Yields the signals that have come.
    """
    seen: list[int] = []

    def forward(number: int, frame: object) -> None:
        seen.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number if len(seen) == 1 else signal.SIGKILL)

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {number: signal.signal(number, forward) for number in watched}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def how_it_ended(code: int, log: Path) -> tuple[str, str, str]:
    """How a process that ended without a word has ended, what that may mean, and the last lines of its log."""
    how = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with exit code {code}"
    hint = " Mostly that means that the machine ran out of memory." if -code == signal.SIGKILL else ""
    last = log.read_text(errors="replace").splitlines()[-LAST_LINES:] if log.exists() else []
    return how, hint, "\n".join(last)
