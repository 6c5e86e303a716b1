"""What a persistent adversary keeps between steps: sources, the moments of their ascents, and how many there were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class HeldSource(nn.Module):
    """One source tensor in a buffer, which is a leaf of the graph of every step.

    Args:
        value: where it starts.
        moments: names of what an ascent keeps beside it, each of its shape.
    """

    value: Tensor
    count: Tensor
    sample_dim = 0
    """The axis of the samples, where every sample has a source of its own; the count may be one for all."""

    def __init__(self, value: Tensor, *, moments: tuple[str, ...]):
        super().__init__()
        self.register_buffer("value", value.detach().requires_grad_())
        for name in moments:
            self.register_buffer(name, torch.zeros_like(value, requires_grad=False))
        self.register_buffer("count", torch.zeros(self.count_shape(value), dtype=torch.float32, device=value.device))

    @staticmethod
    def count_shape(value: Tensor) -> tuple[int, ...]:
        """One number of ascents for the whole tensor."""
        return ()

    @property
    def leaf(self) -> Tensor:
        """What the masks of a training step read, and where its backward leaves the gradient."""
        return self.value

    def read(self, name: str) -> Tensor:
        """A moment or the count, to be moved in place by an ascent."""
        return self.get_buffer(name)

    def write(self, moved: dict[str, Tensor]) -> None:
        """Keep what an ascent has moved: here it was moved where it stands."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To another device, never to another dtype: bfloat16 would swallow small ascents."""
        for name, tensor in self.named_buffers(recurse=False):
            moved = tensor.detach().to(fn(tensor.new_empty(0)).device)
            self._buffers[name] = moved.requires_grad_(tensor.requires_grad)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """An exported run has sources without moments: its ascents begin anew."""
        absent: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs)
        for key in absent:
            if key == prefix + "value":
                missing_keys.append(key)
            else:
                self.get_buffer(key.removeprefix(prefix)).zero_()


class HeldParticles(HeldSource):
    """n particles for every sample, `[n, batch, ...]`; in a step each sample uses one, and only that one moves.

    The particles in use are copied to a leaf of their own. Moments and the number of ascents belong to the particle.
    """

    in_use: Tensor
    sample_dim = 1

    def __init__(self, value: Tensor, *, moments: tuple[str, ...]):
        super().__init__(value, moments=moments)
        self.value.requires_grad_(False)
        self.register_buffer("in_use", torch.zeros_like(value[0]).requires_grad_(), persistent=False)
        self.place: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def count_shape(value: Tensor) -> tuple[int, ...]:
        return tuple(value.shape[:2])

    @torch.no_grad()
    def use(self, place: tuple[Tensor, Tensor]) -> None:
        """Take the particles at (particle, sample) into use."""
        self.place = place
        self.in_use.copy_(self.value[place])

    @property
    def leaf(self) -> Tensor:
        return self.in_use

    def read(self, name: str) -> Tensor:
        return self.get_buffer(name)[self.place]

    def write(self, moved: dict[str, Tensor]) -> None:
        for name, tensor in {**moved, "value": self.in_use}.items():
            self.get_buffer(name)[self.place] = tensor.detach()


def ascent_state(module: nn.Module) -> set[str]:
    """Names in the state of a module that only further ascents need: moments, and how many there were."""
    held = [(path, m) for path, m in module.named_modules() if isinstance(m, HeldSource)]
    return {f"{path}.{name}" for path, m in held for name, _ in m.named_buffers() if name != "value"}
