"""What a rank holds and needs at most, under DDP and under FSDP2, at a size where the trained parameters dominate.

    python benchmarks/ranks.py [--ranks 2 4] [--d 2048] [--C 4096]

Each training is two steps on two sites (d x d), as its own processes on the CPU over gloo. Held: numbers of parameters,
gradients and Adam moments after a step, as a share of the whole. Peak: the most resident memory of rank 0 in a
phase (VmHWM of /proc, Linux), beyond what the process held before anything was built.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from pdlightning import ParameterDecomposition
from pdlightning.masking import AllSites, Uniform
from pdlightning.metrics import FaithfulnessLoss, ImportanceMinimalityLoss, OutputMSE, ReconstructionLoss
from pdlightning.modules import SharedMLP
from pdlightning.sharding import ShardedStrategy

BATCH = 16
STRATEGIES = {"ddp": lambda: DDPStrategy(init_sync=False, gradient_as_bucket_view=True), "fsdp": ShardedStrategy}


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (the most since `forget_peak`) of this process, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e6


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Peaks(lightning.Callback):
    """The most memory of building (sharding included), of the first step and of the second."""

    def __init__(self) -> None:
        self.peaks: list[float] = []

    def note(self) -> None:
        self.peaks.append(resident("VmHWM"))
        forget_peak()

    def on_train_start(self, *_: Any) -> None:
        self.note()

    def on_train_batch_end(self, *_: Any) -> None:
        self.note()


def held(optimizer: torch.optim.Optimizer, group: str) -> dict[str, float]:
    """What this rank holds of the parameters of a group, their gradients and moments, as a share of the whole."""
    parameters = next(g["params"] for g in optimizer.param_groups if g["name"] == group)
    tensors = {
        "parameters": parameters,
        "gradients": [p.grad for p in parameters],
        "moments": [m for p in parameters for m in (optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])],
    }
    return {
        kind: sum(len((x.to_local() if isinstance(x, DTensor) else x).flatten()) for x in xs)
        / sum(x.numel() for x in xs)
        for kind, xs in tensors.items()
    }


def one_rank(strategy: str, d: int, C: int) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=ranks)
    before = resident("VmRSS")
    forget_peak()
    target = nn.Sequential(nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)).eval().requires_grad_(False)
    recon = ReconstructionLoss(coeff=1.0, source=Uniform(), routing=AllSites(), comparison=OutputMSE())
    losses = {
        "faithfulness": FaithfulnessLoss(coeff=1.0),
        "importance": ImportanceMinimalityLoss(coeff=1e-3, p=1.0),
        "recon": recon,
    }
    model = ParameterDecomposition(target=target, sites={"*": C}, ci_fn=SharedMLP(hidden=[d]), losses=losses)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    peaks = Peaks()
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", devices=ranks, callbacks=[peaks], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, inference_mode=False, use_distributed_sampler=False,
        strategy=STRATEGIES[strategy](),
    )  # fmt: skip
    trainer.fit(model, DataLoader(torch.randn(2 * BATCH // ranks, d), batch_size=BATCH // ranks))  # type: ignore[arg-type]
    if rank == 0:
        groups = {group: held(trainer.optimizers[0], group) for group in ("components", "ci_fn")}
        now = resident("VmRSS") - before
        print(json.dumps({"numbers": numbers, "held": groups, "peaks": [p - before for p in peaks.peaks], "now": now}))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the end of a gloo group may wait for ever


def measure(strategy: str, ranks: int, d: int, C: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "STORE": f"{folder}/store", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "x",
            }  # fmt: skip
            call = [sys.executable, __file__, "--rank-of", strategy, "--d", str(d), "--C", str(C)]
            out, err = (subprocess.PIPE, None) if rank == 0 else (subprocess.DEVNULL, subprocess.DEVNULL)
            processes.append(subprocess.Popen(call, env=environment, stdout=out, stderr=err, text=True))
        said, _ = processes[0].communicate()
        for process in processes:
            process.wait()
    return json.loads(said.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--C", type=int, default=4096)
    parser.add_argument("--rank-of", choices=["ddp", "fsdp"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        one_rank(arguments.rank_of, arguments.d, arguments.C)
    print(f"{date.today()}, torch {torch.__version__}, 2 sites of {arguments.d} x {arguments.d}, C {arguments.C}")
    print("| ranks | strategy | held: components, ci_fn | after a step GB | peak of step 2 | of step 1 | of building |")
    print("|---|---|---|---|---|---|---|")
    for ranks in arguments.ranks:
        for strategy in ("ddp", "fsdp"):
            found = measure(strategy, ranks, arguments.d, arguments.C)
            shares = ["/".join(f"{share:.3f}" for share in group.values()) for group in found["held"].values()]
            building, first, second = found["peaks"]
            print(
                f"| {ranks} | {strategy} | {', '.join(shares)} | {found['now']:.2f} | {second:.2f} | {first:.2f} |"
                f" {building:.2f} |"
            )
    print(f"{found['numbers']:,} trained parameters: {found['numbers'] * 16 / 1e9:.2f} GB with gradients and moments")


if __name__ == "__main__":
    main()
