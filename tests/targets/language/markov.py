"""Tokens whose best prediction is known: two can follow each, one of them three times in four."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pdlightning.data import KeyedDataModule, Stream
from pdlightning.functional.random import KeyedRandom


class MarkovTokens(KeyedDataModule):
    """Token v is followed by 2v + 1 (probability 3/4) or 2v + 2, modulo the vocabulary.

    `fails_at`: the training batch that cannot be read, as when a machine goes down.
    """

    def __init__(self, *, vocab_size: int = 11, n_ctx: int = 8, fails_at: int | None = None, **arguments: Any) -> None:
        super().__init__(**{"batch_size": 8, "eval_batches": 2, "seed": 0} | arguments)
        self.vocab_size, self.n_ctx, self.fails_at = vocab_size, n_ctx, fails_at

    @property
    def fingerprint(self) -> str:
        return f"markov {self.vocab_size}"

    def unigram_entropy(self) -> float:
        """Every token is as frequent as any other."""
        return math.log(self.vocab_size)

    def batch(self, step: int, stream: Stream = "train") -> Any:
        if stream == "train" and step == self.fails_at:
            raise ConnectionError("the machine went down")
        return super().batch(step, stream)

    def draw(self, random: KeyedRandom, stream: Stream) -> tuple[Tensor, Tensor]:
        u = random.uniform(self.n_ctx + 1, "data", stream)
        rows = [(u[:, 0] * self.vocab_size).long()]
        for t in range(1, self.n_ctx + 1):
            rows.append((2 * rows[-1] + 1 + (u[:, t] > 0.75).long()) % self.vocab_size)
        ids = torch.stack(rows, dim=-1)
        return ids[:, :-1], ids[:, 1:]


BEST_LOSS = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
