"""Jobs of a sweep side by side: processes of this machine that each do one job after another, and share its cores.

A job whose process dies fails alone; the processes end with the one that started them, however it ends.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

from pdlightning.catalogue import reason
from pdlightning.launching.jobs import Job, done_before, fail, run_job, summary_in
from pdlightning.launching.processes import CORES, cores, forwarded_signals, how_it_ended
from pdlightning.results import VERDICT, number
from pdlightning.resume import LOG, has_checkpoint


class Worker:
    """A process that does jobs, and the job it is doing."""

    def __init__(self, *, share: int):
        self.connection, theirs = Pipe()
        self.job: Job | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pdlightning.launching.local", str(theirs.fileno())],
            env={**os.environ, CORES: str(share)},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C reaches the process that started it, which tells it once
        )
        theirs.close()

    def begin(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(BrokenPipeError):  # it has died: its end is heard where answers are
            self.connection.send(job)

    def answer(self) -> float | None:
        """The objective of its job; None where the process has died."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.wait()
            return None


class Pool:
    """At most `jobs` workers, started as they are needed."""

    def __init__(self, *, jobs: int):
        self.jobs = jobs
        self.workers: list[Worker] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(self, jobs: Iterable[Job]) -> list[float]:
        """The objective of each job, nan of one that failed.

        Raises:
            SystemExit: by Ctrl-C or another signal, after every job has ended with a checkpoint.
        """
        waiting = deque(jobs)
        order = [job.number for job in waiting]
        folder = waiting[0].folder.parent if waiting else Path()
        values: dict[int, float] = {}
        if not self.workers:
            at_once = f"Up to {self.jobs} jobs side by side." if self.jobs > 1 else "One job at a time."
            print(f"{at_once} What each says is in the {LOG} of its folder below {folder}", flush=True)
        with forwarded_signals(self.processes) as signals:
            while waiting or any(worker.job for worker in self.workers):
                while waiting and not signals and self.hand_out(waiting[0], values):
                    waiting.popleft()
                for worker in self.ready():
                    self.settle(worker, values, stopping=bool(signals))
                if signals and not any(worker.job for worker in self.workers):
                    break
        if signals:
            sys.exit(f"Stopped. Go on with:\n  python -m pdlightning resume={folder}")
        return [values[number] for number in order]

    def hand_out(self, job: Job, values: dict[int, float]) -> bool:
        """Give a job to an idle or new worker; False where all are busy."""
        before = done_before(job)
        if before is not None:
            values[job.number] = before
            return True
        worker = next((worker for worker in self.workers if worker.job is None), None)
        if worker is None and len(self.workers) == self.jobs:
            return False
        if worker is None:
            worker = Worker(share=max(1, cores() // self.jobs))
            self.workers.append(worker)
            self.processes.append(worker.process)
        print(f"{job.title} {'goes on' if has_checkpoint(job.folder) else 'begins'}", flush=True)
        worker.begin(job)
        return True

    def ready(self) -> list[Worker]:
        """Wait for an answer, or the end, of one worker at least. A signal is a reason to look around too."""
        if not any(worker.job for worker in self.workers):
            return []
        heard = wait([worker.connection for worker in self.workers], timeout=1.0)
        return [worker for worker in self.workers if worker.connection in heard]

    def settle(self, worker: Worker, values: dict[int, float], *, stopping: bool) -> None:
        """Take the answer of a worker; one that has died is forgotten, and its job has failed."""
        job, value = worker.job, worker.answer()
        worker.job = None
        if value is None:
            self.workers.remove(worker)
            self.processes.remove(worker.process)
            if job is None or stopping:
                return
            how, hint, last = how_it_ended(worker.process.returncode, job.folder / LOG)
            fail(job, f"Its process ended {how}.{hint}\n{last}")
            value = math.nan
        elif job is not None:
            print(outcome(job, value), flush=True)
        if job is not None:
            values[job.number] = value


def outcome(job: Job, value: float) -> str:
    summary = summary_in(job.folder)
    if math.isnan(value) or summary is None:
        return f"{job.title} failed: {reason(job.folder)}"
    return f"{job.title}: {VERDICT[summary['solved']]}, {number(summary['seconds'])} s, objective {number(value)}"


@contextlib.contextmanager
def said_into(path: Path) -> Iterator[None]:
    """Whatever this process and its children print goes into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [os.dup(1), os.dup(2)]
    try:
        with path.open("ab") as file:
            for number_, stream in enumerate((sys.stdout, sys.stderr), start=1):
                stream.flush()
                os.dup2(file.fileno(), number_)
        yield
    finally:
        for number_, stream in enumerate((sys.stdout, sys.stderr), start=1):
            stream.flush()
            os.dup2(kept[number_ - 1], number_)
            os.close(kept[number_ - 1])


def receive(connection: Connection, jobs: queue.SimpleQueue[Job]) -> None:
    """Hand on jobs; end this process with the one that sends them, even in the middle of a job."""
    while True:
        try:
            jobs.put(connection.recv())
        except (EOFError, ConnectionResetError):
            os._exit(1)


def main() -> None:
    """`python -m pdlightning.launching.local CONNECTION`: one of the processes."""
    connection = Connection(int(sys.argv[1]))
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=receive, args=(connection, jobs), daemon=True).start()
    try:
        import torch

        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(cores())
        while True:
            job = jobs.get()
            with said_into(job.folder / LOG):
                value = run_job(job)
            connection.send(value)
    except (KeyboardInterrupt, SystemExit):  # stopped on purpose: the words are those of who started us
        os._exit(1)


if __name__ == "__main__":
    main()
