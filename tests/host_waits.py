"""Trainings on the device `meta`, whose tensors have no numbers: whoever would make the host wait is seen.

Who asks for a number fails, and what is copied from the host is written down. Code that treats the CPU in its own way
treats `meta` as it does a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pdlightning.functional import random

DEVICE = torch.device("meta")
OF_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
"""By these the numbers of a list come from the host, of which no dispatcher is told where they go to `meta`."""
NOT_OURS = (__file__, str(Path(torch.__file__).parent))
FIRST = 1
"""The first step that is watched: the one before makes what is kept, such as the state of the optimiser."""


class Waits:
    """Where the host would wait, `file:line operation` for each time."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.watching = False

    def add(self, what: object) -> None:
        if self.watching:
            self.found.append(f"{place(sys._getframe(1))} {what}")


def place(frame: FrameType | None) -> str:
    """The innermost line outside torch."""
    while frame is not None and frame.f_code.co_filename.startswith(NOT_OURS):
        frame = frame.f_back
    return "nowhere" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class Copies(TorchDispatchMode):
    """Operations of tensors on the device that read one of the host, or need a number to know a shape.

    A GPU takes a single number of the host as an argument of an elementwise kernel. A copy does not wait if it says so
    (`non_blocking`) and its source is pinned.
    """

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = ([x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out))
        if not any(x.device == DEVICE for x in (*given, *made)):
            return out
        copies = "copy" in func._overloadpacket.__name__
        promised = copies and kwargs.get("non_blocking", False)
        for x in given:
            an_argument = x.ndim == 0 and not copies and torch.Tag.pointwise in func.tags
            if x.device.type == "cpu" and not an_argument and not (promised and hasattr(x, "was_pinned")):
                self.waits.add(f"{func} of {tuple(x.shape)} from the host")
        if func._overloadpacket in (torch.ops.aten.index_put, torch.ops.aten.index_put_):
            by_mask = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
            if by_mask and args[2].numel() != 1:
                self.waits.add(f"{func} with a mask")
        return out


class Numbers(TorchFunctionMode):
    """Tensors made of numbers of the host; and what is pinned, for which there is no memory without a GPU."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.pin_memory:
            args[0].was_pinned = True
            return args[0]
        out = func(*args, **(kwargs or {}))
        made = func in OF_NUMBERS and out.device == DEVICE and out is not args[0]
        listed = func in INDEXING and args[0].device == DEVICE and any(isinstance(i, list) for i in as_tuple(args[1]))
        if made or listed:
            self.waits.add(f"{func.__name__} of numbers")
        return out


def as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


class Watch(Callback):
    def __init__(self, waits: Waits):
        self.waits = waits

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # type: ignore[override]
        self.waits.watching = FIRST <= trainer.global_step < trainer.max_steps


class OnNoDevice(SingleDeviceStrategy):
    """Everything on `meta`, from where nothing comes back."""

    def __init__(self) -> None:
        super().__init__(device=DEVICE)

    def teardown(self) -> None:
        pass


class NoDevice(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """What torch does on a GPU and would not do on `meta`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        optimizer = sys.modules[torch.optim.Optimizer.__module__]
        patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [DEVICE.type])
        patch.setattr(optimizer, "_get_foreach_kernels_supported_devices", lambda: [DEVICE.type])
        patch.setattr(_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: [DEVICE.type])
        patch.setattr(random, "hash_rows", random.hash_rows._init_fn)  # or only the shapes it makes would be seen
        yield


def waits_of(module: LightningModule, data: Any, *, steps: int = 3) -> list[str]:
    """Where the host would wait in the steps of a training but the first, its loop and its batches included."""
    waits = Waits()
    trainer = lightning.Trainer(
        max_steps=steps, strategy=OnNoDevice(), accelerator=NoDevice(), logger=False, callbacks=[Watch(waits)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, inference_mode=False,
        log_every_n_steps=steps + 1, limit_val_batches=0,
    )  # fmt: skip
    of_a_module = isinstance(data, lightning.LightningDataModule)
    with as_on_a_gpu(), Copies(waits), Numbers(waits):
        trainer.fit(module, **{"datamodule" if of_a_module else "train_dataloaders": data})
    assert trainer.global_step == steps
    return waits.found
