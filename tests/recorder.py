"""A LightningModule that keeps the batches it is trained on."""

from __future__ import annotations

import torch
from lightning import LightningModule


class Recorder(LightningModule):
    """`seen` are the batches of the training, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.seen.append(batch)
        return self.weight * batch.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)
