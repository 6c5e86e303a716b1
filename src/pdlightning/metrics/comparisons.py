"""Comparisons of a masked run with the clean one (spec R3): each gives (sum, count)."""

from __future__ import annotations

from pdlightning.functional.kl import kl_pair
from pdlightning.functional.losses import Pair, squared_error
from pdlightning.modules.batches import token_ids
from pdlightning.modules.component_model import ComponentModel, Run
from pdlightning.observation import Observation


class Comparison:
    """`needs_outputs`: whether the runs must write down the outputs of the sites."""

    needs_outputs = False

    def prepare(self, model: ComponentModel) -> None:
        """Called once with the model, before any run: refuse sites that do not fit."""

    def check(self, observation: Observation) -> None:
        """Refuse, with a ValueError, what can be seen to be wrong before any training."""

    def __call__(self, clean: Run, masked: Run) -> Pair:
        raise NotImplementedError(f"{type(self).__name__} must return (sum, count) of two runs.")


class OutputMSE(Comparison):
    """Squared error of the target's output over all its elements: `mse`."""

    def check(self, observation: Observation) -> None:
        tokens, output = token_ids(observation.batch), observation.clean.output
        if tokens is not None and output.shape[:-1] == tokens.shape and output.shape[-1] > int(tokens.max()):
            raise ValueError(
                f"OutputMSE compares vectors, but the batch is of tokens and the output {tuple(output.shape)} looks"
                " like their logits: take comparison={_target_: pdlightning.metrics.OutputKL}."
            )

    def __call__(self, clean: Run, masked: Run) -> Pair:
        return squared_error(clean.output, masked.output)


class OutputKL(Comparison):
    """KL(softmax(clean) || softmax(masked)) summed over the vocabulary, per position: `kl`."""

    def __call__(self, clean: Run, masked: Run) -> Pair:
        return kl_pair(clean.output, masked.output, clean.log_normalizer)


class HiddenMSE(Comparison):
    """Squared error of the sites' outputs, over all their elements: `hidden`."""

    needs_outputs = True

    def __call__(self, clean: Run, masked: Run) -> Pair:
        pairs = [squared_error(clean.outputs[site], out) for site, out in masked.outputs.items()]
        return sum(total for total, _ in pairs), sum(count for _, count in pairs)  # type: ignore[return-value]
