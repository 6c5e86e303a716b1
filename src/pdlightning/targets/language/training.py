"""Pretraining of a language model: AdamW on the next token, with its losses written down and checkpoints to go on from.

Whatever is random is so by key, and the data knows the step, so a training that goes on ends in the same bits.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor, nn

from pdlightning.checkpoints import AtomicCheckpointIO, checkpoint_step, checkpoints_by_step, latest_checkpoint
from pdlightning.data.tokens import Tokens
from pdlightning.functional.schedules import schedule_value
from pdlightning.loggers import MetricsCSV
from pdlightning.targets.language.blocks import LanguageModel
from pdlightning.targets.training import quiet_lightning

Precision = Literal["32-true", "bf16-mixed"]
Losses = list[dict[str, float]]
"""One row per look: `step`, `train` and `validation`, in nats per token."""

BETAS = (0.9, 0.95)
KEPT = 2  # checkpoints: the newest, and one more in case the newest is damaged
LOGITS_AT_ONCE = 1 << 27


class LanguageModelTraining(LightningModule):
    """AdamW (betas 0.9, 0.95) on the mean of -log softmax(model(x))[y] over batches (x, y) of tokens and next tokens.

    Args:
        model: the network to train.
        steps: optimizer steps.
        lr: learning rate at its peak: after a linear warmup, before a cosine down to `final_frac` of it (spec S1).
        warmup_frac: fraction of the steps during which the learning rate rises from 0.
        final_frac: last learning rate, as a fraction of lr.
        weight_decay: of matrices (two axes or more); gains and biases have none.
        clip: largest norm of the gradient.
        micro_batches: parts of a batch that go through the model one after the other, for want of memory.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        steps: int,
        lr: float,
        warmup_frac: float,
        final_frac: float,
        weight_decay: float,
        clip: float,
        micro_batches: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # a step is one batch, in however many parts
        self.model = model
        self.steps, self.lr = steps, lr
        self.warmup_frac, self.final_frac = warmup_frac, final_frac
        self.weight_decay, self.clip, self.micro_batches = weight_decay, clip, micro_batches
        self.losses: list[Tensor] = []  # since the last look

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, betas=BETAS, fused=True)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        for group in optimizer.param_groups:
            group["lr"] = schedule_value(
                self.global_step, self.steps, self.lr, "cosine", self.warmup_frac, self.final_frac
            )
        x, y = batch
        parts = zip(x.chunk(self.micro_batches), y.chunk(self.micro_batches), strict=True)
        self.losses.append(torch.stack([self.backward_part(*part, of=len(x)) for part in parts]).sum())
        nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        optimizer.step()
        optimizer.zero_grad()

    def backward_part(self, x: Int[Tensor, "part sequence"], y: Int[Tensor, "part sequence"], *, of: int) -> Tensor:
        """The part's share of the loss of a batch of `of` rows, after its backward."""
        loss = next_token_loss(self.model(x), y) * (len(x) / of)
        self.manual_backward(loss)
        return loss.detach()

    def loss_since_last_look(self) -> float:
        mean = torch.stack(self.losses).mean().item()
        self.losses = []
        return mean


def next_token_loss(
    logits: Float[Tensor, "*leading sequence vocab"],
    labels: Int[Tensor, "*leading sequence"],
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, ""]:
    """-log softmax(logits)[label] over all positions, in nats."""
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction=reduction)


@torch.no_grad()
def validation_loss(model: LanguageModel, data: Tokens) -> float:
    """Mean over the tokens of `data.val_dataloader()` of -log p(next token), in nats, where the model is."""
    device = next(model.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in data.val_dataloader():
        rows = max(1, LOGITS_AT_ONCE // (batch[0].shape[-1] * model.vocab_size))
        for x, y in zip(*(part.to(device).split(rows) for part in batch), strict=True):
            total += next_token_loss(model(x), y, reduction="sum").double().cpu()
            count += y.numel()
    return total.item() / count


class Looks(Callback):
    """Every so many steps and after the last: both losses into the CSV and on the screen, and a checkpoint."""

    def __init__(self, *, every: int, folder: Path, first_step: int) -> None:
        self.every, self.folder, self.saved = every, folder, first_step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            rank_zero_info(
                f"Pretraining stopped after step {trainer.global_step}; the same command goes on from step {self.saved}"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        assert isinstance(pl_module, LanguageModelTraining) and isinstance(pl_module.model, LanguageModel)
        train = pl_module.loss_since_last_look()
        with trainer.precision_plugin.forward_context():
            validation = validation_loss(pl_module.model, trainer.datamodule)  # pyright: ignore[reportAttributeAccessIssue]
        if not math.isfinite(train + validation):
            raise ValueError(
                f"Pretraining has loss {train} and validation loss {validation} at step {step}: lower its lr, now"
                f" {pl_module.lr}."
            )
        rank_zero_info(
            f"Pretraining, step {step} of {trainer.max_steps}: loss {train:.3f}, validation loss {validation:.3f}"
        )
        assert isinstance(trainer.logger, MetricsCSV)
        trainer.logger.log_metrics({"train": train, "validation": validation}, step=step)
        trainer.logger.write()
        trainer.save_checkpoint(self.folder / f"step={step}.ckpt")
        self.saved = step
        for old in checkpoints_by_step(self.folder)[KEPT:]:
            old.unlink()


def pretrain(
    training: LanguageModelTraining,
    data: Tokens,
    *,
    accelerator: str,
    precision: Precision,
    eval_every: int,
    workspace: Path,
) -> Losses:
    """Train on one device and leave the model on the CPU; returns the losses of every look.

    Args:
        training: the model and how to train it.
        data: batches (x, y); its train loader starts at the trainer's step.
        accelerator, precision: as the lightning.Trainer takes them.
        eval_every: steps between two looks.
        workspace: where checkpoints and losses.csv are kept. What an interrupted training left there is gone on with.

    Raises:
        ValueError: if the loss is not finite.
    """
    workspace.mkdir(parents=True, exist_ok=True)
    checkpoint = latest_checkpoint(workspace) if checkpoints_by_step(workspace) else None
    first_step = 0 if checkpoint is None else checkpoint_step(checkpoint)
    table = workspace / "losses.csv"
    size = sum(p.numel() for p in training.model.parameters())
    start = "" if checkpoint is None else f", from step {first_step}"
    rank_zero_info(f"Pretraining {size:,} parameters for {training.steps} steps{start}; checkpoints are in {workspace}")
    with quiet_lightning():
        trainer = Trainer(
            max_steps=training.steps,
            accelerator=accelerator,
            devices=1,
            precision=precision,
            # Also under torchrun or Slurm, a target is trained by each process alone.
            plugins=[LightningEnvironment(), AtomicCheckpointIO()],
            logger=MetricsCSV(path=table, first_step=first_step),
            callbacks=[Looks(every=eval_every, folder=workspace, first_step=first_step)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            inference_mode=False,
            use_distributed_sampler=False,
            default_root_dir=workspace,
        )
        trainer.fit(training, datamodule=data, ckpt_path=checkpoint)
    training.cpu()
    # Left attached, the data would go on from the end of this training.
    data.trainer = None
    with table.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
