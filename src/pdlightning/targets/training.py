"""Training of a target: plain supervised learning, before any decomposition."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, nn

from pdlightning.functional.schedules import ScheduleKind, schedule_value

Loss = Callable[[Tensor, Tensor], Tensor]


def last_position_cross_entropy(
    logits: Float[Tensor, "batch sequence vocab"], label: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Mean over the batch of -log softmax(logits[:, -1])[label], in nats."""
    return nn.functional.cross_entropy(logits[:, -1], label)


class TargetTraining(LightningModule):
    """AdamW on loss(model(x), label) for batches (x, label).

    Args:
        model: the network to train; parameters that require no grad stay as they are.
        loss: from (output, label) to a scalar, such as `torch.nn.functional.mse_loss`.
        steps: length of the schedule.
        lr: learning rate, at its peak.
        schedule: `constant`, or `linear` or `cosine` down to 0 at the last step (spec S1).
        warmup_frac: fraction of the steps during which the learning rate rises linearly from 0.
        weight_decay: of AdamW.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        loss: Loss,
        steps: int,
        lr: float,
        schedule: ScheduleKind,
        warmup_frac: float,
        weight_decay: float,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.steps = steps
        self.lr = lr
        self.schedule: ScheduleKind = schedule
        self.warmup_frac = warmup_frac
        self.weight_decay = weight_decay
        self.last_loss = torch.tensor(float("nan"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay, fused=True)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        loss = self.loss(self.model(x), label)
        self.last_loss = loss.detach()
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = schedule_value(
                self.global_step, self.steps, self.lr, self.schedule, self.warmup_frac, final_frac=0.0
            )


def train_target(training: TargetTraining, data: LightningDataModule, *, accelerator: str = "cpu") -> float:
    """Train on one device and leave the model on the CPU; returns the loss of the last step.

    Uses no random numbers of its own and leaves no file behind.
    """
    with quiet_lightning():
        trainer = Trainer(
            max_steps=training.steps,
            accelerator=accelerator,
            devices=1,
            # Also under torchrun or Slurm, a target is trained by each process alone.
            plugins=[LightningEnvironment()],
            barebones=True,
            inference_mode=False,
        )
        trainer.fit(training, datamodule=data)
    training.cpu()
    # Left attached, the data would go on from the end of this training, on its device.
    data.trainer = None
    loss = training.last_loss.item()
    if not math.isfinite(loss):
        raise ValueError(f"Training of the target ended with loss {loss}: lower its lr, now {training.lr}.")
    return loss


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's remarks on its Trainer, which would read as remarks on the run around it."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        logger.setLevel(level)
