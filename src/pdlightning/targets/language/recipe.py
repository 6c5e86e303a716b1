"""How a language model to decompose is made: pretrained, checked, and gone on with after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from lightning.fabric.utilities import rank_zero_info

from pdlightning.data.tokens import Tokens, check_context, check_vocabulary
from pdlightning.targets.language.blocks import LanguageModel
from pdlightning.targets.language.training import LanguageModelTraining, Precision, pretrain
from pdlightning.targets.recipe import Recipe, Trained, UnfitTargetError


@dataclass(frozen=True, kw_only=True)
class LanguageModelRecipe(Recipe):
    """Everything that decides the weights of a pretrained language model.

    Args:
        model: builds the untrained network from `seed=`.
        data: builds the tokens from `seed=`, with `labels="next"`. Its batch_size is what one step sees.
        check: judges the trained model, given it and the data; see `BelowUnigramEntropy`.
        steps: optimizer steps.
        lr, warmup_frac, final_frac, weight_decay, clip, micro_batches: see `LanguageModelTraining`.
        eval_every: steps between two looks at the validation loss, each with a row of losses and a checkpoint.
        precision: `32-true`, or `bf16-mixed` for a GPU: products in bfloat16, weights in float32.
        seed: key of the weights and of the order of the data.
    """

    model: Callable[..., LanguageModel]
    data: Callable[..., Tokens]
    warmup_frac: float
    final_frac: float
    weight_decay: float
    clip: float
    micro_batches: int
    eval_every: int
    precision: Precision

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip", "micro_batches", "eval_every"):
            self.check_positive(name)
        for name in ("warmup_frac", "final_frac"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} of a target recipe must be in [0, 1], got {getattr(self, name)}.")

    def beyond_config(self) -> dict[str, Any]:
        """What the corpus is on this machine: a model belongs to its tokens alone."""
        return {"tokens": self.data(seed=self.seed).fingerprint}

    def make(self, *, accelerator: str, workspace: Path) -> Trained:
        """Pretrain, or go on with what is in the workspace.

        Raises:
            UnfitTargetError: if the model does not pass the check.
            ValueError: if data and model do not belong together, or the training diverges.
        """
        from pdlightning.figures.pretraining import plot_pretraining

        start = perf_counter()
        model, data = self.model(seed=self.seed).train(), self.data(seed=self.seed)
        check_vocabulary(data, model.vocab_size)
        check_context(data, model.n_ctx)
        training = LanguageModelTraining(
            model=model,
            steps=self.steps,
            lr=self.lr,
            warmup_frac=self.warmup_frac,
            final_frac=self.final_frac,
            weight_decay=self.weight_decay,
            clip=self.clip,
            micro_batches=self.micro_batches,
        )
        losses = pretrain(
            training,
            data,
            accelerator=accelerator,
            precision=self.precision,
            eval_every=self.eval_every,
            workspace=workspace,
        )
        model.eval().requires_grad_(False)
        result = self.check(model, data)
        if not result.passed:
            raise UnfitTargetError(
                f"The pretrained model failed its check: {result.message}. Train longer (steps), or loosen the check."
            )
        seconds = perf_counter() - start
        rank_zero_info(f"Target pretrained in {seconds:.0f} s: {result.message}.")
        summary = {
            "seed": self.seed,
            "steps": self.steps,
            "seconds": round(seconds, 2),
            "loss": losses[-1]["train"],
            "validation_loss": losses[-1]["validation"],
            "validation_curve": [[int(row["step"]), row["validation"]] for row in losses],
            "check": result.message,
            "measures": result.measures,
        }
        figures = {"losses": plot_pretraining(losses, unigram_entropy=data.unigram_entropy())}
        return Trained(model, summary, figures, {"losses": (workspace / "losses.csv").read_text()})
