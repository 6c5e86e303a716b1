"""One training step on tensors without numbers: what it costs, told without memory and without touching anything."""

from __future__ import annotations

import weakref
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from pdlightning.functional.kl import chunks_of_a_device
from pdlightning.functional.random import columns_of_their_own
from pdlightning.masking.held import HeldSource
from pdlightning.ranks import as_the_only_rank
from pdlightning.runtime import mixed_precision

if TYPE_CHECKING:
    from pdlightning.decomposition import ParameterDecomposition

TRUE_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
"""What the Trainer casts a whole module to, under these precisions; under others it stays as it is."""


class NotCountable(RuntimeError):
    """The step cannot be taken without numbers; the message says why."""


@dataclass(frozen=True)
class StepCost:
    """Of one training step of one rank, in eager mode, no two samples alike.

    Args:
        flops: of all matrix products and attention, forward and backward, adversaries and the frozen target included. A
            product of (a, b) and (b, c) is 2abc; attention counts all pairs of positions.
        activations: bytes; with the gradients of all parameters the greatest sum, at any moment, of what lives beside
            parameters, optimizer and persistent sources. Most gradients come when most of the rest has gone.
            torch.compile keeps what it chooses, an allocator rounds up and leaves gaps.
        sources: bytes of persistent sources with the moments of their ascents.
    """

    flops: int
    activations: int
    sources: int


class DryDecomposition:
    """A decomposition as it stands, its tensors with shape and dtype alone.

    Args:
        decomposition: is only read.
        precision: of the Trainer.
    """

    def __init__(self, decomposition: ParameterDecomposition, *, precision: str):
        self.precision, self.mode = precision, FakeTensorMode()
        try:
            with FakeCopyMode(self.mode):
                self.copy = deepcopy(decomposition)
            with self.mode:
                cast(self.copy, TRUE_DTYPES.get(precision))
        except Exception as error:  # of a target that is somebody else's code
            raise not_countable(error) from error
        self.device = next(self.copy.parameters()).device

    def cost(self, batch: Any, *, samples: int | None = None, gradients_kept: bool = False) -> StepCost:
        """What the first step costs on a batch like this one; with `samples`, if it had so many.

        Args:
            gradients_kept: all gradients are there at all times, as where batches are accumulated.

        Raises:
            NotCountable: the shape of something depends on numbers, or the code knows no such tensors.
        """
        try:
            with self.mode, columns_of_their_own(), chunks_of_a_device(), as_the_only_rank():
                return self.counted(self.without_numbers(batch, samples), gradients_kept)
        except Exception as error:  # of a target that is somebody else's code
            raise not_countable(error) from error

    def counted(self, batch: Any, gradients_kept: bool) -> StepCost:
        copy, counter = self.copy, Counter()
        copy.steps = 1
        copy.set_progress(0)
        if gradients_kept:  # they are no part of what comes and goes
            for parameter in copy.parameters():
                parameter.register_post_accumulate_grad_hook(counter.forget_gradient)
        for x in (*copy.parameters(), *copy.buffers(), *copy.target.parameters(), *copy.target.buffers()):
            counter.made[id(x.untyped_storage())] = 0  # a view of it makes nothing
        with counter:
            with mixed_precision(self.precision, self.device):
                total = copy._compute_step(batch, copy.step_now, None, None).total
            total.backward()
        held = [m for m in copy.modules() if isinstance(m, HeldSource)]
        sources = sum(size(x) for source in held for x in source.buffers())
        gradients = 0 if gradients_kept else sum(size(p.grad) for p in copy.parameters() if p.grad is not None)
        return StepCost(counter.flops, max(counter.peak - sources - gradients, 0), sources)

    def without_numbers(self, batch: Any, samples: int | None) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
        came = len(tensors[0]) if tensors else 0

        def empty(x: Tensor) -> Tensor:
            shape = (samples, *x.shape[1:]) if samples is not None and x.ndim and len(x) == came else x.shape
            dtype = TRUE_DTYPES.get(self.precision, x.dtype) if x.is_floating_point() else x.dtype
            return torch.empty(shape, dtype=dtype, device=self.device)

        return pytree.tree_map_only(Tensor, empty, batch)


def not_countable(error: Exception) -> NotCountable:
    return NotCountable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


def cast(module: nn.Module, dtype: torch.dtype | None) -> None:
    """The floats of a copy and of its target, in place; `Module.to` cannot swap such tensors."""
    if dtype is None:
        return
    for part in (*module.modules(), *getattr(module, "target", nn.Module()).modules()):
        for name, x in part._parameters.items():
            if x is not None and x.is_floating_point():
                part._parameters[name] = nn.Parameter(x.detach().to(dtype), requires_grad=x.requires_grad)
        for name, x in part._buffers.items():
            if x is not None and x.is_floating_point() and not isinstance(part, HeldSource):
                part._buffers[name] = x.to(dtype)


def size(x: Tensor) -> int:
    """Bytes of the numbers of a tensor."""
    return x.numel() * x.element_size()


class Counter(TorchDispatchMode):
    """Adds up the FLOPs of what is computed inside, and follows the bytes of what it makes until they are given back.

    Who asks for a number, such as a model that checks the range of its tokens, is told 0.
    torch's FlopCounterMode follows modules too, and so refuses the autograd.grad of an adversary.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live = self.peak = 0
        self.made: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return zero_of(args[0].dtype)
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (formula := FORMULAS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.follow(leaf)
        return out

    def follow(self, x: Tensor) -> None:
        storage = x.untyped_storage()  # views share it, and it is one object for as long as it lives
        if (key := id(storage)) not in self.made:
            self.made[key] = storage.nbytes()
            self.live += self.made[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.live -= self.made.pop(key, 0)

    def forget_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.forget(id(parameter.grad.untyped_storage()))


def zero_of(dtype: torch.dtype) -> bool | int | float:
    if dtype.is_floating_point:
        return 0.0
    return False if dtype is torch.bool else 0


def _cpu_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _cpu_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)


FORMULAS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,  # torch's registry has only the GPU's
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}
