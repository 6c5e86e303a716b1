"""From text to ids and back: by a tokenizer of transformers, by one trained on the corpus, by bytes, or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdlightning.data.hub import check_on_hub, may_download, not_here

if TYPE_CHECKING:
    import tokenizers

END = "<|endoftext|>"
TRAINING_CHARACTERS = 20_000_000
"""A tokenizer is trained on no more than this from the start of the corpus: more costs minutes and gains little."""


class Tokenizer(ABC):
    """Text to ids in 0 .. vocab_size - 1. Every document ends with the id `end_id`, which no text contains."""

    vocab_size: int
    end_id: int

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the ids of a text, as plain values."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """The ids of every text, without an end."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> list[str]:
        """The text of every token. Joined they are the text, but for characters that several tokens share."""

    def train(self, texts: Iterable[str]) -> None:  # noqa: B027 -- most have nothing to learn, save or load
        """Learn from the training documents, where there is something to learn."""

    def save(self, folder: Path) -> None:  # noqa: B027
        """Write what was learnt into an existing folder."""

    def load(self, folder: Path) -> None:  # noqa: B027
        """Read what `save` wrote."""


class PretrainedTokenizer(Tokenizer):
    """A tokenizer of transformers.

    Args:
        name_or_path: a local folder, or a name on the Hugging Face hub.
        revision: of a hub name, where it is required: a commit, tag or branch.
        end_token: ends a document; by default the tokenizer's own end-of-sequence token.
        download: fetch what is not on this machine yet.
    """

    def __init__(
        self, *, name_or_path: str, revision: str | None = None, end_token: str | None = None, download: bool = False
    ) -> None:
        local = Path(name_or_path).expanduser().is_dir()
        if local == (revision is not None):
            raise ValueError(
                f"The tokenizer {name_or_path} is a folder, and has no revision: drop {revision}."
                if local
                else f"The tokenizer {name_or_path} is no folder here, and a name on the hub needs a revision."
            )
        self.name = name_or_path
        self.tokenizer = self.load_folder() if local else self.load_hub(revision or "", download=download)
        self.vocab_size = len(self.tokenizer)
        self.end_id = self.id_of_end(end_token)

    def load_folder(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                str(Path(self.name).expanduser()), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"The tokenizer {self.name} cannot be loaded: {error}") from error

    def load_hub(self, revision: str, *, download: bool) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.name, revision=revision, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            if not may_download(download):
                raise ValueError(not_here("tokenizer", self.name, download=download)) from error
        check_on_hub("model", self.name, revision)
        try:
            return AutoTokenizer.from_pretrained(self.name, revision=revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"The tokenizer {self.name} cannot be loaded: {error}") from error

    def id_of_end(self, end_token: str | None) -> int:
        if end_token is None:
            if self.tokenizer.eos_token_id is None:
                raise ValueError(f"The tokenizer {self.name} has no end-of-sequence token: name its end_token.")
            return self.tokenizer.eos_token_id
        if end_token not in self.tokenizer.get_vocab():
            special = self.tokenizer.all_special_tokens
            raise ValueError(f"end_token {end_token!r} is not in the vocabulary of {self.name}; special are {special}.")
        return self.tokenizer.convert_tokens_to_ids(end_token)

    def identity(self) -> dict[str, Any]:
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        content = json.dumps(self.tokenizer.get_vocab(), sort_keys=True) if fast is None else fast.to_str()
        return {"content": hashlib.sha256(content.encode()).hexdigest(), "end_id": self.end_id}

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,  # the name of the end token, where it stands in a text, is text
            return_attention_mask=False,
            verbose=False,  # of documents longer than the model's context, which are cut into rows later
        )
        return encoded["input_ids"]

    def decode(self, ids: Sequence[int]) -> list[str]:
        return texts_in_context(ids, self.tokenizer.decode)


class TrainedTokenizer(Tokenizer):
    """Byte-level BPE, trained on the training documents and kept with their ids; the end token has id 0.

    Args:
        vocab_size: number of ids: the end token, 256 bytes and the merges.
    """

    def __init__(self, *, vocab_size: int) -> None:
        if vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes and an end token), got {vocab_size}.")
        self.vocab_size = vocab_size
        self.end_id = 0
        self.trained: tokenizers.Tokenizer | None = None

    def identity(self) -> dict[str, Any]:
        import tokenizers

        library = f"tokenizers {tokenizers.__version__}"
        return {"vocab_size": self.vocab_size, "characters": TRAINING_CHARACTERS, "trained_by": library}

    def train(self, texts: Iterable[str]) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(first_characters(texts, TRAINING_CHARACTERS), trainer)
        if tokenizer.get_vocab_size() != self.vocab_size:
            raise ValueError(
                f"The training documents give {tokenizer.get_vocab_size()} tokens at most, and vocab_size is "
                f"{self.vocab_size}: lower it, or take more text."
            )
        self.trained = tokenizer

    def save(self, folder: Path) -> None:
        self.ready().save(str(folder / "tokenizer.json"))

    def load(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.trained = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ready(self) -> tokenizers.Tokenizer:
        if self.trained is None:
            raise RuntimeError("This tokenizer was neither trained nor loaded: prepare the data it belongs to first.")
        return self.trained

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        encoder = self.ready()
        encoder.encode_special_tokens = True  # split into text, as above
        return [encoding.ids for encoding in encoder.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> list[str]:
        decoder = self.ready()
        return texts_in_context(ids, lambda some: decoder.decode(some, skip_special_tokens=False))


class ByteTokenizer(Tokenizer):
    """The bytes of the text in UTF-8; the end is 256."""

    def __init__(self) -> None:
        self.vocab_size = 257
        self.end_id = 256

    def identity(self) -> dict[str, Any]:
        return {}

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [text.encode() for text in texts]

    def decode(self, ids: Sequence[int]) -> list[str]:
        return [END if i == self.end_id else bytes([i]).decode(errors="backslashreplace") for i in ids]


class PlainIds(Tokenizer):
    """For documents that are token ids already, where no tokenizer is at hand; a token reads as its number.

    Args:
        vocab_size: number of ids.
        end_id: ends a document.
    """

    def __init__(self, *, vocab_size: int, end_id: int) -> None:
        if not 0 <= end_id < vocab_size:
            raise ValueError(f"end_id must be in 0..{vocab_size - 1}, got {end_id}.")
        self.vocab_size = vocab_size
        self.end_id = end_id

    def identity(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "end_id": self.end_id}

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        raise ValueError("The documents are text, and PlainIds takes ids: choose a tokenizer, or a column of ids.")

    def decode(self, ids: Sequence[int]) -> list[str]:
        return [f" {i}" for i in ids]


def texts_in_context(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What each id adds to the text of the id before it: alone, some tokenizers would drop the space it begins with."""
    alone = lru_cache(maxsize=None)(lambda i: decode([i]))
    texts = [alone(i) for i in ids[:1]]
    for before, i in itertools.pairwise(ids):
        both = decode([before, i])
        # Halves of one character have no text that goes on.
        texts.append(both[len(alone(before)) :] if both.startswith(alone(before)) else alone(i))
    return texts


def first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Texts until `limit` characters were given, the last one cut."""
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return
