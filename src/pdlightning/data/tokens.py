"""Rows of text tokens: concatenated documents, cut, in an order that depends on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from pdlightning.data.corpus import Corpus
from pdlightning.data.keyed import Batch, KeyedDataModule, Stream
from pdlightning.data.token_store import StoredTokens, obtain_tokens
from pdlightning.data.token_stream import TokenStream
from pdlightning.data.tokenizers import Tokenizer
from pdlightning.functional.random import key_generator

PADDED_BY = 128
"""Models round their vocabulary up, to a multiple of this or by up to a tenth."""


@dataclass(frozen=True)
class StreamedBatches:
    """Iterates over the batches of a stream that `open_stream` opens anew, where the training stands."""

    open_stream: Callable[[], TokenStream]
    batch: Callable[[np.ndarray], Batch]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, iter(self.open_stream()))


class Tokens(KeyedDataModule):
    """Rows of n_ctx tokens from a corpus (spec D2): documents with an end token behind each, one after the other, cut.

    Whole documents are trained on or evaluated on, never both: one that equals an eval document is not trained on.

    The ids are made once and kept under `PDLIGHTNING_CACHE`. A training epoch shows every row once, in an order that is
    a function of (seed, epoch); eval batches are the same rows for every seed. A streamed corpus is read in its own
    order, each rank its share; its position is part of a checkpoint.

    Nothing is read before it is needed. `setup` reads, and finds what is wrong: of a stream, with its beginning.

    Args:
        corpus: the documents.
        tokenizer: text to ids.
        n_ctx: tokens in a row.
        batch_size: rows in one step over all ranks together.
        eval_batches: batches in one evaluation.
        seed: key of the order of the training rows.
        labels: `none`: a batch is int64 `[batch, n_ctx]`; `next`: a pair of these, (x, y), cut from rows of n_ctx + 1,
            where y is the token after x.
    """

    def __init__(
        self,
        *,
        corpus: Corpus,
        tokenizer: Tokenizer,
        n_ctx: int,
        batch_size: int,
        eval_batches: int,
        seed: int,
        labels: Literal["none", "next"],
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batches=eval_batches, seed=seed)
        if n_ctx < 1:
            raise ValueError(f"n_ctx must be at least 1, got {n_ctx}.")
        if labels not in ("none", "next"):
            raise ValueError(f"labels must be none or next, got {labels!r}.")
        self.corpus, self.tokenizer = corpus, tokenizer
        self.n_ctx, self.labels = n_ctx, labels
        self.width = n_ctx + (labels == "next")
        self.stream: TokenStream | None = None
        self.stored_position: Mapping[str, Any] | None = None

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """Hash of the ids and the tokenizer: a network trained on some can be used with no others."""
        return self.tokens.fingerprint

    @cached_property
    def tokens(self) -> StoredTokens:
        """The ids of both splits.

        Raises:
            ValueError: if the corpus cannot be read, or has too few rows.
        """
        tokens = obtain_tokens(
            self.corpus, self.tokenizer, eval_tokens=self.eval_batches * self.batch_size * self.width
        )
        self.check_rows("eval", len(tokens.eval), self.eval_batches * self.batch_size)
        if not self.corpus.streaming:
            self.check_rows("training", len(tokens.train), self.batch_size)
        return tokens

    def check_rows(self, split: str, tokens: int, wanted: int) -> None:
        if tokens // self.width < wanted:
            batches = f" in {self.eval_batches} batches" if split == "eval" else ""
            raise ValueError(
                f"The {split} split of the {self.corpus} has {tokens} tokens, {tokens // self.width} rows of "
                f"{self.width}, and {wanted} rows are asked for{batches}: lower batch_size, n_ctx or eval_batches, or "
                "take more text."
            )

    def setup(self, stage: str | None = None) -> None:
        """Read the tokens, or make them: what is wrong with the data is an error here."""
        self.own_samples()
        self.tokens  # noqa: B018

    def batch(self, step: int, stream: Stream = "train") -> Batch:
        """This rank's rows of the batch at `step` of a split, a pure function of its arguments and the seed."""
        own, start = self.own_samples(), step * self.batch_size
        places = range(start + own.start, start + own.stop)
        if stream == "eval":
            order, tokens = row_order(0, "eval", len(self.tokens.eval) // self.width), self.tokens.eval
            return self.labelled(tokens.rows([order[place] for place in places], self.width))
        if self.corpus.streaming:
            raise ValueError(
                "The training batches of a streamed corpus come one after the other: use train_dataloader."
            )
        tokens = self.tokens.train
        n = len(tokens) // self.width
        rows = [row_order(self.seed, f"epoch {place // n}", n)[place % n] for place in places]
        return self.labelled(tokens.rows(rows, self.width))

    def labelled(self, rows: Int[np.ndarray, "batch width"]) -> Batch:
        ids = torch.from_numpy(rows.reshape(-1, self.width).astype(np.int64))
        return ids if self.labels == "none" else (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Pinned, a batch goes to a GPU while the host goes on; from any other memory the host waits for the copy."""
        if self.trainer is None or self.trainer.strategy.root_device.type in ("cpu", "mps"):
            return batch
        return batch.pin_memory() if isinstance(batch, Tensor) else (batch[0].pin_memory(), batch[1].pin_memory())

    def train_dataloader(self) -> Iterable[Batch]:
        return StreamedBatches(self.open_stream, self.labelled) if self.corpus.streaming else super().train_dataloader()

    def open_stream(self) -> TokenStream:
        """This rank's share of the documents, from where the training stands."""
        from datasets.distributed import split_dataset_by_node

        trainer, first = self.trainer, self.first_step()
        rank, ranks, kept = 0, 1, 1
        if trainer is not None:
            rank, ranks, kept = trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches
        in_eval = set(self.tokens.eval.keys.tolist())
        self.stream = TokenStream(
            split_dataset_by_node(self.corpus.open().train, rank, ranks),  # type: ignore[arg-type]
            corpus=self.corpus,
            tokenizer=self.tokenizer,
            in_eval=in_eval,
            length=len(self.own_samples()) * self.width,
            first=first,
            position=self.position_of(first, rank=rank, ranks=ranks),
            remembered=kept + 4,
        )
        return self.stream

    def position_of(self, batch: int, *, rank: int, ranks: int) -> Mapping[str, Any] | None:
        if batch == 0:
            return None
        stored = self.stored_position
        if stored is None or stored["batch"] != batch:
            raise ValueError(f"The position of the stream at batch {batch} is not known: start the training anew.")
        if len(stored["ranks"]) != ranks:
            raise ValueError(
                f"The checkpoint holds the positions of {len(stored['ranks'])} ranks in the stream, and there are "
                f"{ranks}: a streamed corpus goes on with as many ranks as it was begun with."
            )
        return stored["ranks"][rank]

    def state_dict(self) -> dict[str, Any]:
        """Where every rank stands in a streamed corpus; of another corpus the step says it all."""
        if self.stream is None:
            return {}
        batch = self.first_step()
        return {"batch": batch, "ranks": gathered(self.stream.position(batch))}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.stored_position = state_dict

    def unigram_entropy(self) -> float:
        """Cross-entropy of the eval split under the training frequencies, in nats: what a target has to be better than.

        -sum_v q_v log((n_v + 1) / (N + V)), with n_v the occurrences of id v among N training tokens, q_v its share of
        the eval tokens, V = vocab_size. Of a streamed corpus, the first million training tokens count.
        """
        train = self.tokens.train.counts(self.vocab_size)
        evaluation = self.tokens.eval.counts(self.vocab_size)
        log_p = np.log(train + 1) - np.log(train.sum() + self.vocab_size)
        return float(-(evaluation @ log_p) / evaluation.sum())

    def decode(self, ids: Int[Tensor, " n"] | Sequence[int]) -> list[str]:
        """The text of every token of a row."""
        self.tokens  # noqa: B018 -- a trained tokenizer comes with them
        return self.tokenizer.decode(ids.tolist() if isinstance(ids, Tensor) else list(ids))


@lru_cache(maxsize=4)
def row_order(seed: int, name: str, n: int) -> Int[np.ndarray, " n"]:
    """A permutation of n rows by key."""
    return torch.randperm(n, generator=key_generator(seed, "order", name)).numpy()


def gathered(value: Any) -> list[Any]:
    """The value of every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def check_vocabulary(data: Tokens, model_vocab: int) -> None:
    """Raise ValueError unless a model with `model_vocab` embeddings can be the one that the tokenizer belongs to."""
    if data.vocab_size > model_vocab:
        raise ValueError(
            f"The tokenizer has {data.vocab_size} ids and the model only {model_vocab}: use the model's own tokenizer."
        )
    if model_vocab > data.vocab_size + max(PADDED_BY, data.vocab_size // 10):
        raise ValueError(
            f"The model has {model_vocab} ids and the tokenizer only {data.vocab_size}, more than padding explains: "
            "use the model's own tokenizer."
        )


def check_context(data: Tokens, model_context: int) -> None:
    """Raise ValueError if a row is longer than what the model can take."""
    if data.n_ctx > model_context:
        raise ValueError(
            f"Rows of n_ctx {data.n_ctx} tokens are longer than the model's context of {model_context}: lower n_ctx."
        )
