"""`ParameterDecomposition.from_pretrained`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pdlightning.decomposition import ParameterDecomposition


class Pretrained:
    """What a ParameterDecomposition can do before there is one."""

    @staticmethod
    def from_pretrained(
        spec: str | Path, *, step: int | None = None, device: str | torch.device = "cpu", allow: Iterable[str] = ()
    ) -> ParameterDecomposition:
        """The decomposition of a run from wherever it is: target rebuilt, weights loaded, in eval mode.

        Arguments and errors are those of `pdlightning.load_run`, which gives its config and numbers beside it.
        """
        from pdlightning.loading import load_run

        return load_run(spec, step=step, device=device, allow=allow).decomposition
