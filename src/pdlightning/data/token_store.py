"""Token ids on disk: made once from the documents of a corpus, found again by the hash of what decides them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn

from pdlightning.config import config_hash
from pdlightning.data.corpus import Corpus, OpenCorpus
from pdlightning.data.documents import AT_ONCE, Document, document_key, encode_documents, in_batches, read_documents
from pdlightning.data.tokenizers import Tokenizer
from pdlightning.storage import atomic_folder, complete_folder, default_cache_dir

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Documents = Dataset | IterableDataset

FORMAT_VERSION = 1
TRAIN, EVAL, RECORD = "train.arrow", "eval.arrow", "record.json"
TOKENS_IN_A_CHUNK = 1 << 20
SAMPLE_OF_A_STREAM = 1 << 20
"""Training tokens of a streamed corpus that are kept, to know the frequencies."""


class DamagedTokensError(RuntimeError):
    """Stored tokens are not what was written."""


class TokenArray:
    """The ids of documents one after the other, int32, in pieces that stay on the disk until they are used.

    Args:
        chunks: the pieces.
        keys: of the documents.
    """

    def __init__(self, chunks: list[np.ndarray], keys: np.ndarray) -> None:
        self.chunks, self.keys = chunks, keys
        self.starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows(self, indices: Iterable[int], width: int) -> np.ndarray:
        """Rows of `width` ids, int64 `[n, width]`: row i begins at token i * width."""
        return np.stack([self.span(int(i) * width, width) for i in indices]).astype(np.int64)

    def span(self, start: int, width: int) -> np.ndarray:
        """`width` ids from a place on, also across chunks."""
        chunk = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while width:
            part = self.chunks[chunk][start - self.starts[chunk] :][:width]
            parts.append(part)
            start, width, chunk = start + len(part), width - len(part), chunk + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each id occurs."""
        zero = np.zeros(vocab_size, dtype=np.int64)
        return sum((np.bincount(chunk, minlength=vocab_size) for chunk in self.chunks), zero)


@dataclass(frozen=True)
class StoredTokens:
    """Both splits, and a hash of their content. Of a streamed corpus, `train` is a sample of its beginning."""

    train: TokenArray
    eval: TokenArray
    fingerprint: str


def obtain_tokens(corpus: Corpus, tokenizer: Tokenizer, *, eval_tokens: int) -> StoredTokens:
    """The token ids of a corpus: from the cache if they are there, else made and stored; the tokenizer is then ready.

    Args:
        corpus, tokenizer: what to tokenise, and how.
        eval_tokens: how many of the eval split to keep of a streamed corpus; of another all are kept.

    A damaged entry is reported and made again. Processes that want the same tokens at once wait for the first.
    """
    parts = {"corpus": corpus, "tokenizer": tokenizer}
    identity: dict[str, Any] = {"format_version": FORMAT_VERSION}
    identity |= {name: {"class": type(part).__qualname__, **part.identity()} for name, part in parts.items()}
    if corpus.streaming:
        identity["eval_tokens"] = eval_tokens
    root = default_cache_dir() / "data"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / config_hash(identity)
    with FileLock(f"{folder}.lock"):
        stored = complete_folder(folder)
        if stored.exists():
            try:
                return load_tokens(stored, tokenizer)
            except DamagedTokensError as error:
                rank_zero_warn(f"{error} They are made again.")
        rank_zero_info(f"Tokenising the {corpus}.")
        start = perf_counter()
        opened = corpus.open()
        with atomic_folder(folder) as aside:
            limits = (SAMPLE_OF_A_STREAM, eval_tokens) if corpus.streaming else (None, None)
            write_tokens(aside, corpus, opened, tokenizer, limits)
            record = {"files": checksums(aside), "identity": identity}
            (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        tokens = load_tokens(folder, tokenizer)
        rank_zero_info(
            f"{len(tokens.train):,} training tokens of {len(tokens.train.keys):,} documents and {len(tokens.eval):,} "
            f"eval tokens of {len(tokens.eval.keys):,}, in {perf_counter() - start:.0f} s. Kept in {folder}"
        )
        return tokens


def write_tokens(
    folder: Path, corpus: Corpus, opened: OpenCorpus, tokenizer: Tokenizer, limits: tuple[int | None, int | None]
) -> None:
    """Train the tokenizer, and write what it makes of both splits, up to `limits` tokens of (train, eval)."""

    def documents(split: Documents, keep: Callable[[int], bool]) -> Iterator[tuple[int, Document]]:
        keyed = ((document_key(document), document) for document in read_documents(split, corpus.column, corpus))
        return ((key, document) for key, document in keyed if keep(key))

    training = documents(opened.train, lambda key: not corpus.held_out(key))
    if (first := next(training, None)) is None:
        raise ValueError(f"The {corpus} has no training documents; its eval_fraction is {corpus.eval_fraction}.")
    tokenizer.train(document for _, document in itertools.chain([first], training) if isinstance(document, str))
    tokenizer.save(folder)

    if opened.eval is None:
        held_out = documents(opened.train, corpus.held_out)
    else:
        held_out = documents(opened.eval, lambda key: True)
    write_split(folder / EVAL, held_out, tokenizer, limits[1])
    in_eval = set(read_split(folder / EVAL).keys.tolist())
    if not in_eval:
        fraction = f"eval_fraction {corpus.eval_fraction} holds out whole documents, and took none; raise it"
        reason = fraction if opened.eval is None else "its eval data hold none"
        raise ValueError(f"The {corpus} has no eval documents: {reason}.")
    training = documents(opened.train, lambda key: not corpus.held_out(key) and key not in in_eval)
    write_split(folder / TRAIN, training, tokenizer, limits[0])


def write_split(path: Path, documents: Iterator[tuple[int, Document]], tokenizer: Tokenizer, limit: int | None) -> None:
    """Write documents as an arrow file of `datasets`, until there are `limit` tokens."""
    import pyarrow as pa
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"key": Value("uint64"), "ids": Sequence(Value("int32"))})
    with ArrowWriter(features=features, path=str(path), writer_batch_size=TOKENS_IN_A_CHUNK) as writer:
        for keys, ids in chunks_of_tokens(documents, tokenizer, limit):
            offsets = np.cumsum([0, *(len(document) for document in ids)], dtype=np.int32)
            column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(ids)))
            writer.write_table(pa.table({"key": pa.array(keys, pa.uint64()), "ids": column}))
        writer.finalize()


def chunks_of_tokens(
    documents: Iterator[tuple[int, Document]], tokenizer: Tokenizer, limit: int | None
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Keys and ids of documents, about a million tokens at once; the documents that complete `limit` are the last."""
    keys: list[int] = []
    ids: list[np.ndarray] = []
    before = waiting = 0
    for batch in in_batches(documents, AT_ONCE):
        keys += [key for key, _ in batch]
        ids += (new := encode_documents([document for _, document in batch], tokenizer))
        waiting += sum(map(len, new))
        complete = limit is not None and before + waiting >= limit
        if complete or waiting >= TOKENS_IN_A_CHUNK:
            yield keys, ids
            keys, ids, before, waiting = [], [], before + waiting, 0
        if complete:
            return
    if keys:
        yield keys, ids


def load_tokens(folder: Path, tokenizer: Tokenizer) -> StoredTokens:
    """Stored tokens; the tokenizer learns what belongs to them.

    Raises:
        DamagedTokensError: if a file is missing, or not the one that was written.
    """
    try:
        record: Mapping[str, Any] = json.loads((folder / RECORD).read_text())
        if checksums(folder) != record["files"]:
            raise ValueError(f"its files are not those whose checksums are in {RECORD}")
        train, evaluation = read_split(folder / TRAIN), read_split(folder / EVAL)
        tokenizer.load(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedTokensError(f"The stored tokens {folder} are damaged ({error}).") from error
    return StoredTokens(train, evaluation, config_hash(record["files"]))


def read_split(path: Path) -> TokenArray:
    from datasets import Dataset

    table = Dataset.from_file(str(path)).data
    chunks = [chunk.flatten().to_numpy() for chunk in table.column("ids").chunks]
    return TokenArray([chunk for chunk in chunks if len(chunk)], table.column("key").to_numpy())


def checksums(folder: Path) -> dict[str, str]:
    """Of every file but the record."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != RECORD:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return found
