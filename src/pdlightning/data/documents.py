"""Documents, one by one: read from a dataset, told apart by their key, turned into ids."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pdlightning.data.tokenizers import Tokenizer

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Document = str | np.ndarray
AT_ONCE = 256
"""Documents that are tokenised together, which a tokenizer spreads over the cores."""


def read_documents(dataset: Dataset | IterableDataset, column: str, corpus: object) -> Iterator[Document]:
    """The documents in a column: text, or int64 ids. Empty and missing ones are left out.

    Raises:
        ValueError: if there is no such column, or the dataset cannot be read; `corpus` names it.
    """
    examples = iter(dataset)
    while True:
        try:
            example = next(examples, None)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"The {corpus} cannot be read: {error}") from error
        if example is None:
            return
        if len(document := document_of(example, column, corpus)):
            yield document


def document_of(example: dict[str, Any], column: str, corpus: object) -> Document:
    """The document of one example: a text, or ids."""
    if column not in example:
        raise ValueError(f"The {corpus} has no column {column!r}. Its columns are {', '.join(example)}.")
    content = example[column]
    if content is None or isinstance(content, str):
        return content or ""
    ids = np.asarray(content)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"The column {column!r} of the {corpus} must hold text or lists of ints, and holds {content!r:.80}."
        )
    return ids.astype(np.int64)


def document_key(document: Document) -> int:
    """64 bits that equal documents share and different ones do not."""
    content = document.encode() if isinstance(document, str) else document.tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of every document, int32, with the end token behind them.

    Raises:
        ValueError: if a document of ids holds one that the tokenizer does not have.
    """
    texts = [document for document in documents if isinstance(document, str)]
    encoded = iter(tokenizer.encode(texts) if texts else [])
    return [
        with_end(next(encoded) if isinstance(document, str) else checked_ids(document, tokenizer), tokenizer)
        for document in documents
    ]


def with_end(ids: Any, tokenizer: Tokenizer) -> np.ndarray:
    ended = np.empty(len(ids) + 1, dtype=np.int32)
    ended[:-1] = np.frombuffer(ids, dtype=np.uint8) if isinstance(ids, bytes) else ids
    ended[-1] = tokenizer.end_id
    return ended


def checked_ids(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Ids of a corpus that is tokenised already, without an end token that stands there already."""
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
        raise ValueError(
            f"A document holds the id {wrong}, and the tokenizer has 0..{tokenizer.vocab_size - 1}: it is not the one "
            "that made these ids."
        )
    return ids[:-1] if ids[-1] == tokenizer.end_id else ids


def in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
