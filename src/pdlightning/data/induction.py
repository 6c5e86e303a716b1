"""Sequences that only an induction head can finish."""

from __future__ import annotations

import torch
from torch import Tensor

from pdlightning.data.keyed import KeyedDataModule, Stream
from pdlightning.functional.random import KeyedRandom


class InductionTokens(KeyedDataModule):
    """Sequences BOS T* S M T* S with label M, the token that followed the first S (spec 9).

    The alphabet is 0 .. vocab - 3 for the uniform tokens T and M, then S = vocab - 2 and BOS = vocab - 1. The first S
    stands uniformly at one of the positions 1 .. prefix_window, the second at the end.

    A batch is the pair (tokens int64 `[batch, length]`, label int64 `[batch]`), the label for the last position.

    Args:
        vocab: size of the alphabet with S and BOS, at least 4.
        length: tokens in a sequence, BOS and both S included.
        prefix_window: last position where the first S may stand; at most length - 3, to leave room for M.
        batch_size: samples in one step over all ranks together.
        eval_batches: batches in one evaluation.
        seed: key of every draw.
    """

    def __init__(
        self, *, vocab: int, length: int, prefix_window: int, batch_size: int, eval_batches: int, seed: int
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batches=eval_batches, seed=seed)
        if vocab < 4:
            raise ValueError(f"vocab must be at least 4 (two uniform tokens, S and BOS), got {vocab}.")
        if length < 4:
            raise ValueError(f"length must be at least 4 (BOS S M S), got {length}.")
        if not 1 <= prefix_window <= length - 3:
            raise ValueError(
                f"prefix_window must lie in 1..{length - 3} for length {length}, since the token after the first S "
                f"must come before the last position; got {prefix_window}."
            )
        self.vocab = vocab
        self.length = length
        self.prefix_window = prefix_window
        self.special, self.bos = vocab - 2, vocab - 1

    def draw(self, random: KeyedRandom, stream: Stream) -> tuple[Tensor, Tensor]:
        letter, place = random.uniform(self.length + 1, "data", stream).split([self.length, 1], dim=-1)
        tokens = (letter * self.special).long()
        first = 1 + (place * self.prefix_window).long()
        label = tokens.gather(-1, first + 1).squeeze(-1)
        tokens.scatter_(-1, first, torch.full_like(first, self.special))
        tokens[:, 0] = self.bos
        tokens[:, -1] = self.special
        return tokens, label
