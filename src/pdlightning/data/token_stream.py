"""Rows of tokens from a stream of documents, with positions to go on from."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pdlightning.data.corpus import Corpus
from pdlightning.data.documents import AT_ONCE, document_key, encode_documents, in_batches, read_documents
from pdlightning.data.tokenizers import Tokenizer

if TYPE_CHECKING:
    from datasets import IterableDataset


class TokenStream:
    """Iterates endlessly over pieces of `length` ids, int32, from the training documents one behind the other.

    At the end of the documents it begins again.

    Args:
        documents: of this rank, read in their order.
        corpus: that the documents are of; says which are held out.
        tokenizer: ready to encode.
        in_eval: keys of documents that belong to the eval split.
        length: ids in a piece.
        first: number of the first piece.
        position: where it begins, from `position` of another stream; by default at the first document.
        remembered: of how many pieces the position is kept. A Trainer fetches batches before it uses them, so the
            position of a checkpoint lies behind the newest.
    """

    def __init__(
        self,
        documents: IterableDataset,
        *,
        corpus: Corpus,
        tokenizer: Tokenizer,
        in_eval: Container[int],
        length: int,
        first: int,
        position: Mapping[str, Any] | None,
        remembered: int,
    ) -> None:
        self.documents, self.corpus, self.tokenizer = documents, corpus, tokenizer
        self.in_eval, self.length, self.next = in_eval, length, first
        self.beginning = documents.state_dict()
        self.left = np.empty(0, dtype=np.int32)
        if position is not None:
            documents.load_state_dict(position["documents"])
            self.left = position["left"].numpy()
        self.read = self.beginning if position is None else position["documents"]
        self.positions = deque([(first, self.read, self.left)], maxlen=remembered + 1)
        self.chunks = self.encoded()

    def position(self, piece: int) -> dict[str, Any]:
        """Where piece number `piece` begins: the state of the documents, and ids that were read but not yet used."""
        for number, read, left in self.positions:
            if number == piece:
                return {"documents": read, "left": torch.from_numpy(left.copy())}
        raise ValueError(f"Piece {piece} of the stream is too far behind the newest, {self.next - 1}, to go back to.")

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            while len(self.left) < self.length:
                self.left = np.concatenate([self.left, next(self.chunks)])
                self.read = self.documents.state_dict()
            piece, self.left = self.left[: self.length], self.left[self.length :]
            self.next += 1
            self.positions.append((self.next, self.read, self.left))
            yield piece

    def encoded(self) -> Iterator[np.ndarray]:
        """The ids of some documents at a time. Between two of them, the documents' state says where the next begin."""
        passes_without_one = 0
        while passes_without_one < 2:  # the first pass may begin at the end
            passes_without_one += 1
            for batch in in_batches(read_documents(self.documents, self.corpus.column, self.corpus), AT_ONCE):
                if kept := [document for document in batch if self.trained_on(document_key(document))]:
                    passes_without_one = 0
                    yield np.concatenate(encode_documents(kept, self.tokenizer))
            self.documents.load_state_dict(self.beginning)
        raise ValueError(f"The {self.corpus} has no training documents for this rank: use fewer ranks, or more files.")

    def trained_on(self, key: int) -> bool:
        return not self.corpus.held_out(key) and key not in self.in_eval
