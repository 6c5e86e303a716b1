"""Comparisons of a masked run with the clean one (spec R3): each gives (sum, count)."""

from __future__ import annotations

from pdlightning.functional.losses import Pair, kl_pair, squared_error
from pdlightning.modules.component_model import Run


class Comparison:
    """`needs_outputs`: whether the runs must write down the outputs of the sites."""

    needs_outputs = False

    def __call__(self, clean: Run, masked: Run) -> Pair:
        raise NotImplementedError(f"{type(self).__name__} must return (sum, count) of two runs.")


class OutputMSE(Comparison):
    """Squared error of the target's output over all its elements: `mse`."""

    def __call__(self, clean: Run, masked: Run) -> Pair:
        return squared_error(clean.output, masked.output)


class OutputKL(Comparison):
    """KL(softmax(clean) || softmax(masked)) summed over the vocabulary, per position: `kl`."""

    def __call__(self, clean: Run, masked: Run) -> Pair:
        return kl_pair(clean.output, masked.output)


class HiddenMSE(Comparison):
    """Squared error of the sites' outputs, over all their elements: `hidden`."""

    needs_outputs = True

    def __call__(self, clean: Run, masked: Run) -> Pair:
        pairs = [squared_error(clean.outputs[site], out) for site, out in masked.outputs.items()]
        return sum(total for total, _ in pairs), sum(count for _, count in pairs)  # type: ignore[return-value]
