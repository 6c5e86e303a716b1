"""A run on several ranks: those that torchrun or srun have started, or ranks of our own under Hydra.

Our ranks get the resolved config, and so the same one in every job of a sweep, whatever proposed its values.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from pdlightning.config import ConfigError, flatten
from pdlightning.launching.processes import cores, forwarded_signals, how_it_ended
from pdlightning.resume import SUMMARY

GRACE = 10.0
"""Seconds for the other ranks to end by themselves, once one has failed."""
PATIENCE = timedelta(minutes=10)
"""So long a rank waits for another, to come or to reach the same place."""
REQUEST, STORE = "request.yaml", "store"
OURS = "PDLIGHTNING_RANKS"
"""In the environment of our ranks: the file in which they meet."""


class RankError(RuntimeError):
    """A rank has failed; the message is its own."""


def run_on_ranks(config: dict[str, Any], folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """`run` on as many ranks as the runtime of the config has devices; returns the content of `summary.json`."""
    runtime = config["runtime"]
    ranks = runtime["devices"] * runtime["nodes"]
    started = ranks_started_by_others()
    if started is not None and started != ranks:
        raise ConfigError(
            f"This is one of {started} ranks that torchrun or srun has started, but the config asks for"
            f" runtime.devices={runtime['devices']} on runtime.nodes={runtime['nodes']}: start {ranks}, or change"
            " these."
        )
    check_devices(runtime)
    if ranks == 1:
        from pdlightning.run import run

        return run(config, folder, resume=resume)
    if started is not None:
        return run_as_rank(config, folder, resume=resume)
    if runtime["nodes"] > 1:
        raise ConfigError(
            f"runtime.nodes={runtime['nodes']}: the ranks of several machines are started by srun or torchrun on each."
        )
    return run_and_watch(config, folder, resume=resume)


def ranks_started_by_others() -> int | None:
    """How many ranks this one is of, where a launcher has started it."""
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(os.environ["SLURM_NTASKS"]) if "SLURM_STEP_ID" in os.environ else None
    return None


def check_devices(runtime: dict[str, Any]) -> None:
    """What the machine lacks is an error before any rank is started."""
    import torch

    if runtime["accelerator"] not in ("gpu", "cuda"):
        return
    there = torch.cuda.device_count()
    if runtime["devices"] > there:
        raise ConfigError(f"runtime.devices={runtime['devices']}, but this machine has {there} GPUs that torch sees.")
    if runtime["precision"].startswith("bf16") and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"runtime.precision={runtime['precision']}, but {torch.cuda.get_device_name()} has no bfloat16: take"
            " precision=32."
        )


def run_and_watch(config: dict[str, Any], folder: Path, *, resume: bool) -> dict[str, Any]:
    """Start the ranks as processes, wait for all, and end all when one fails."""
    place = Path(tempfile.mkdtemp(prefix="pdlightning-ranks-"))
    (place / REQUEST).write_text(
        yaml.safe_dump({"config": config, "folder": str(folder), "resume": resume}, sort_keys=False)
    )
    reader, writer = os.pipe()  # closed by the end of this process, however it ends
    try:
        ranks = [start(rank, place, config["runtime"], reader) for rank in range(config["runtime"]["devices"])]
        os.close(reader)
        with forwarded_signals(ranks):
            wait_for(ranks, place)
    finally:
        os.close(writer)
        shutil.rmtree(place, ignore_errors=True)
    return json.loads((folder / SUMMARY).read_text())


def start(rank: int, place: Path, runtime: dict[str, Any], reader: int) -> subprocess.Popen[bytes]:
    """One rank; what it says is seen of the first alone, of the others it is kept for the case of a failure."""
    ranks = runtime["devices"]
    threads = {} if runtime["threads"] else {"OMP_NUM_THREADS": str(max(1, cores() // ranks))}
    environment = {
        **threads,
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # nobody listens: the ranks meet in a file
        "TORCHELASTIC_RUN_ID": "pdlightning",  # to the Trainer these are ranks that exist already
        OURS: str(place / STORE),
    }
    log = None if rank == 0 else (place / f"{rank}.log").open("wb")
    return subprocess.Popen(
        [sys.executable, "-m", "pdlightning.launching.launch", str(place), str(reader)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=[reader],
        start_new_session=True,  # Ctrl-C reaches this process alone, which tells every rank once
    )


def wait_for(ranks: list[subprocess.Popen[bytes]], place: Path) -> None:
    codes: list[int | None] = []
    failed_at = None
    try:
        while None in (codes := [process.poll() for process in ranks]):
            if failed_at is None and any(codes):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > GRACE:
                break
            time.sleep(0.05)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
    if any(codes):
        raise failure(codes, place)


def failure(codes: list[int | None], place: Path) -> BaseException:
    """What the first rank that failed has said. One that ended without a word is why the others failed.

    `codes` are the exit codes of the ranks, None of those that had to be ended.
    """
    said = sorted(place.glob("error.*.json"), key=lambda path: path.stat().st_mtime_ns)
    silent = [rank for rank, code in enumerate(codes) if code and not (place / f"error.{rank}.json").exists()]
    if said and not silent:
        error = json.loads(said[0].read_text())
        if error["kind"] == "Interrupted":
            from pdlightning.callbacks import Interrupted

            return Interrupted(error["text"])
        if error["kind"] == "KeyboardInterrupt":  # before the first step
            return KeyboardInterrupt()
        return RankError(error["text"])
    number = silent[0]
    code = codes[number] or 0
    how, hint, last = how_it_ended(code, place / f"{number}.log")
    return RankError(
        f"Rank {number} of {len(codes)} ended {how} without a word, and the others were stopped.{hint}\n{last}".rstrip()
    )


def run_as_rank(config: dict[str, Any], folder: Path, *, resume: bool) -> dict[str, Any]:
    """What each rank does: meet the others, see that all have the same config, run."""
    from pdlightning.run import run

    with joined(config, folder) as same_folder:
        return run(config, same_folder, resume=resume)


@contextmanager
def joined(config: dict[str, Any], folder: Path) -> Iterator[Path]:
    """A process group of all ranks; yields the folder of the first rank, for all."""
    import torch
    import torch.distributed as dist

    on_gpu = config["runtime"]["accelerator"] in ("gpu", "cuda")
    if "RANK" not in os.environ:  # srun
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        slurm = SLURMEnvironment()
        os.environ |= {"MASTER_ADDR": slurm.main_address, "MASTER_PORT": str(slurm.main_port)}
        rank, ranks, local = slurm.global_rank(), slurm.world_size(), slurm.local_rank()
    else:
        rank, ranks, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if on_gpu:
        torch.cuda.set_device(local)
    method = f"file://{os.environ[OURS]}" if OURS in os.environ else "env://"
    backend = "nccl" if on_gpu else "gloo"
    try:
        dist.init_process_group(backend, init_method=method, rank=rank, world_size=ranks, timeout=PATIENCE)
    except (dist.DistError, TimeoutError) as error:
        raise ConfigError(
            f"Rank {rank} of {ranks} has waited {PATIENCE.total_seconds():.0f} s for the others. Have all been started,"
            f" and can they reach each other? ({' '.join(str(error).split())[:200]})"
        ) from error
    same_folder = agreed_folder(config, folder)
    if same_folder != folder:  # Hydra has made one for each rank, by the second that it began in
        with suppress(OSError):
            folder.rmdir()
    yield same_folder
    gc.collect()  # a DistributedDataParallel must be gone before its group is
    dist.destroy_process_group()


def agreed_folder(config: dict[str, Any], folder: Path) -> Path:
    """The first rank's folder; every rank raises where one has another config."""
    import torch.distributed as dist

    flat = {key: str(value) for key, value in flatten(config).items()}
    own = {"config": flat, "hash": hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, {**own, "folder": str(folder)})
    for rank, other in enumerate(every):
        if other["hash"] != every[0]["hash"]:
            here, there = every[0]["config"], other["config"]
            keys = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
            raise ConfigError(
                f"Rank {rank} has another config than rank 0 ({', '.join(keys[:5])}): start all with the same words."
            )
    return Path(every[0]["folder"])


def end_with(reader: int, place: Path) -> None:
    """End this process when the one that started it has ended, even by SIGKILL; the place of the ranks goes with it."""

    def watch() -> None:
        os.read(reader, 1)
        shutil.rmtree(place, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """`python -m pdlightning.launching.launch PLACE READER`: one of our ranks."""
    place, number = Path(sys.argv[1]), os.environ["RANK"]
    end_with(int(sys.argv[2]), place)
    request = yaml.safe_load((place / REQUEST).read_text())
    from pdlightning.commands import quiet_libraries, sentence_of

    quiet_libraries()
    try:
        run_as_rank(request["config"], Path(request["folder"]), resume=request["resume"])
    except BaseException as error:
        sentence = sentence_of(error) if isinstance(error, Exception) else None
        said = {"kind": type(error).__name__, "text": sentence or traceback.format_exc()}
        aside = place / f".{number}.tmp"
        aside.write_text(json.dumps(said))
        aside.rename(place / f"error.{number}.json")
        sys.stderr.flush()
        os._exit(1)  # the group of the other ranks is of no use any more, and its end would wait for them


if __name__ == "__main__":
    main()
