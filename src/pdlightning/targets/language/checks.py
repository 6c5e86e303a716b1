"""Is a language model worth decomposing? One that knows no more than how often each token comes is not."""

from __future__ import annotations

from pdlightning.data.tokens import Tokens
from pdlightning.targets.checks import CheckResult
from pdlightning.targets.language.blocks import LanguageModel
from pdlightning.targets.language.training import validation_loss


class BelowUnigramEntropy:
    """Is the validation loss below the entropy of the tokens, taken one by one, by at least `margin`?

    Args:
        margin: in nats per token.
    """

    def __init__(self, *, margin: float) -> None:
        if margin <= 0:
            raise ValueError(f"margin must be positive, got {margin}.")
        self.margin = margin

    def __call__(self, model: LanguageModel, data: Tokens) -> CheckResult:
        loss, entropy = validation_loss(model, data), data.unigram_entropy()
        return CheckResult(
            loss <= entropy - self.margin,
            f"validation loss {loss:.3f}, unigram entropy {entropy:.3f} nats per token, wanted {self.margin:g} below",
            {"validation_loss": loss, "unigram_entropy": entropy},
        )
