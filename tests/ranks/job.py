"""One rank of trainings: `python job.py PLAN.json OUT.pt`, with RANK, WORLD_SIZE and STORE in the environment.

A plan is a list of {name, case, strategy, dtype, squash, save, resume}. Rank 0 writes name -> (whole state, logged
losses).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from adversaries import AdamW, Rows, config_of, decomposition, quiet
from lightning import Callback, Trainer
from parity import COMPARISONS, ROUTINGS, SEED, VECTOR_SITES, batch_of, source_of, vectors_chain
from sequence_parity import RECIPES
from torch.distributed.tensor import DTensor

from pdlightning import ParameterDecomposition
from pdlightning.checkpoints import AtomicCheckpointIO
from pdlightning.functional import derivatives
from pdlightning.metrics import FaithfulnessLoss, ImportanceMinimalityLoss, ReconstructionLoss, SmoothL0Loss
from pdlightning.modules.ci import Squash
from pdlightning.sharding import ShardedStrategy, whole

STEPS, BATCH = 20, 16
derivatives.LARGE = 1  # what a large model computes again is computed again here; the commands run as they are
RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Shares:
    """This rank's share of batch 0, 1, 2, ... from `first` on."""

    def __init__(self, data: str, first: int) -> None:
        self.data, self.first = data, first

    def __iter__(self) -> Iterator[torch.Tensor]:
        step = self.first
        while True:
            yield batch_of(self.data, (BATCH, 2), seed=step).chunk(RANKS)[RANK]
            step += 1


class StopWith(Callback):
    """Ends the training after half of its steps with a checkpoint."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == STEPS // 2:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def plain(ci: str, terms: dict[str, tuple[str, str, str]], squash: Squash, **importance: Any) -> ParameterDecomposition:
    """Stateless sources, every routing and comparison, and the importance terms that are nonlinear in the batch."""
    gamma = importance.pop("gamma", None)
    penalty = SmoothL0Loss(coeff=0.1, gamma=gamma, **importance) if gamma else None
    losses = {
        "faithfulness": FaithfulnessLoss(coeff=1.5),
        "importance": penalty or ImportanceMinimalityLoss(coeff=0.1, p=1.5, **importance),
        **{
            name: ReconstructionLoss(
                coeff=0.7, source=source_of(source), routing=ROUTINGS[routing], comparison=COMPARISONS[comparison]
            )
            for name, (source, routing, comparison) in terms.items()
        },
    }
    settings = AdamW(lr=2e-2, clip=0.3)
    return ParameterDecomposition(
        target=vectors_chain(), sites=VECTOR_SITES, ci_fn=RECIPES[ci](), losses=losses, components_optimizer=settings,
        ci_optimizer=settings, squash=squash, seed=SEED,
    )  # fmt: skip


def build(case: dict[str, Any], squash: Squash) -> ParameterDecomposition:
    if "adversary" in case:
        return decomposition(config_of([case["adversary"]]), case["data"], squash=squash)
    return plain(case["ci"], case["terms"], squash, **case["importance"])


def train(plan: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    data = plan["case"]["data"]
    torch.set_default_dtype(getattr(torch, plan["dtype"]))
    model, rows = build(plan["case"], plan["squash"]), Rows()
    strategy = ShardedStrategy() if plan["strategy"] == "fsdp" else plan["strategy"]
    several = {"strategy": strategy, "devices": RANKS} if RANKS > 1 else {"devices": 1}
    callbacks = [rows, *([StopWith(plan["save"])] if plan["save"] else [])]
    trainer = quiet(STEPS, callbacks=callbacks, plugins=[AtomicCheckpointIO()], **several)
    trainer.fit(model, Shares(data, STEPS // 2 if plan["resume"] else 0), ckpt_path=plan["resume"])
    if RANKS > 1:
        parts = [isinstance(p, DTensor) for p in model.parameters()]
        assert all(parts) if plan["strategy"] == "fsdp" else not any(parts)
        if plan["strategy"] == "fsdp":
            assert_held_in_parts(trainer.optimizers[0])
            assert_used_when_whole(model, next(iter(Shares(data, 0))))
    return {name: x.detach().clone() for name, x in model.whole_state_dict().items()}, rows.rows


def assert_held_in_parts(optimizer: torch.optim.Optimizer) -> None:
    """Of V and U, of the ci function, of their gradients and moments: every number on one rank, in even parts."""
    for group in optimizer.param_groups:
        parameters = group["params"]
        moments = [optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
        for tensors in (parameters, [p.grad for p in parameters], moments):
            own = sum(x.to_local().numel() for x in tensors)
            assert own <= sum(math.ceil(len(x) / RANKS) * (x.numel() // len(x)) for x in tensors)
            everywhere = torch.tensor(own)
            dist.all_reduce(everywhere)
            assert everywhere == sum(x.numel() for x in tensors)


def assert_used_when_whole(model: ParameterDecomposition, batch: torch.Tensor) -> None:
    """By hand only `with whole(...)`, and then as ever: an ablation computes what a mask of one zero does."""
    site, components = next(iter(model.components.items()))
    edit = model.masked(ablate={site: [0]}, delta=False)
    uses = [lambda: model.causal_importances(batch), lambda: model.masked_forward(batch, {}), edit.__enter__]
    for use in uses:
        try:
            use()
        except RuntimeError as error:
            assert "whole(pd.model)" in str(error)
        else:
            raise AssertionError("used in parts")
    with whole(model.model), torch.no_grad():
        lower = model.causal_importances(batch).lower[site]
        mask = torch.ones_like(lower).index_fill(-1, torch.tensor([0]), 0.0)
        with edit:
            edited = model(batch)
        torch.testing.assert_close(edited, model.masked_forward(batch, {site: mask}))
    assert isinstance(components.V, DTensor)


def main() -> None:
    plans, out = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    if RANKS > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{os.environ['STORE']}", rank=RANK, world_size=RANKS,
            timeout=timedelta(seconds=60),
        )  # fmt: skip
    results = {plan["name"]: train(plan) for plan in plans}
    if RANK == 0:
        torch.save(results, out)
    if RANKS > 1:
        dist.barrier()
        os._exit(0)  # everything is written; the end of a gloo group may wait for ever


if __name__ == "__main__":
    main()
