"""FSDP2: V, U, the ci function, their gradients and optimiser state in parts, one on each rank.

Inside `ComponentModel.forward` and `whole` every rank has all parameters, so that whatever reads V and U outside a
module's own forward (weight deltas, masked products) finds them whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from pdlightning.modules.sequence_blocks import Block


def shard(module: nn.Module, mesh: DeviceMesh, *, blocks: bool) -> nn.Module:
    """The module with its parameters in parts over the mesh.

    They are gathered for its forward and stay until its backward is over; with `blocks` those of each block of a
    transformer only while that block computes, which a compiled step does not bear.
    """
    if blocks:
        for block in [part for part in module.modules() if isinstance(part, Block)]:
            fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh, reshard_after_forward=False)  # type: ignore[return-value]


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """V, U and what else is no block of a transformer whole on every rank, to be read; a block gathers itself."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def full(x: Any) -> Any:
    """A sharded tensor in one piece, on every rank; every rank asks at the same time. Anything else as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x: Tensor, other: Any) -> Tensor:
    """A whole tensor in parts like those of another, where that is sharded."""
    return (
        distribute_tensor(x.to(other.device), other.device_mesh, other.placements) if isinstance(other, DTensor) else x
    )


class ShardedStrategy(ModelParallelStrategy):
    """Data parallel over all ranks, with parameters, gradients and optimiser state sharded by FSDP2.

    Checkpoints hold whole tensors in one file, as those of every other strategy do: any number of ranks goes on from
    them, sharded or not.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **arguments)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # "auto" would shard nothing on one machine
        self._tensor_parallel_size = 1
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return {name: full(x) for name, x in self.lightning_module.state_dict().items()}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, map_location="cpu", weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        there = dict(self.lightning_module.named_parameters())
        state = {name: like(x, there.get(name)) for name, x in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        return {**state, "state": {i: {k: full(x) for k, x in s.items()} for i, s in state["state"].items()}}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            parts = {
                i: {k: like(x, parameters[i]) if isinstance(x, Tensor) and x.ndim else x for k, x in s.items()}
                for i, s in stored["state"].items()
            }
            optimizer.load_state_dict({**stored, "state": parts})


def finite(x: Tensor) -> bool:
    """Of a rank's own part."""
    local = x.to_local() if isinstance(x, DTensor) else x
    return bool(torch.isfinite(local).all())
