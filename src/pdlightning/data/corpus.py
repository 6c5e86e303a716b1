"""Where documents come from: the hub, local files, the Python standard library. Nothing is read before `open`."""

from __future__ import annotations

import hashlib
import platform
import re
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pdlightning.data.hub import check_on_hub, datasets_offline, may_download, not_here

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Documents = Dataset | IterableDataset

NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class OpenCorpus:
    """The documents as `datasets` gives them. Without an `eval` of their own, some of `train` are held out by key."""

    train: Documents
    eval: Documents | None


class Corpus(ABC):
    """Documents of text, or of token ids, in one column of a dataset.

    Args:
        column: holds the documents: text, or lists of ints.
        eval_fraction: share of the documents held out for evaluation, where the corpus has no eval split of its own.
            The key of a document, a hash of its content, decides; so equal documents fall on the same side.
        streaming: read the training documents anew in every run, in their order, instead of tokenising them once.
    """

    def __init__(self, *, column: str, eval_fraction: float | None, streaming: bool) -> None:
        if eval_fraction is not None and not 0 < eval_fraction < 1:
            raise ValueError(f"eval_fraction must be in (0, 1), got {eval_fraction}.")
        self.column = column
        self.eval_fraction = eval_fraction
        self.streaming = streaming

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the documents, as plain values; found out without reading them."""

    @abstractmethod
    def open(self) -> OpenCorpus:
        """The documents.

        Raises:
            ValueError: if they are not there.
        """

    def held_out(self, key: int) -> bool:
        """Whether a training document with this key (64 bits) is an eval document."""
        return self.eval_fraction is not None and key < self.eval_fraction * 2**64


class HubDataset(Corpus):
    """A dataset of the Hugging Face hub.

    Args:
        name: `owner/name` on the hub.
        config: of the dataset, where it has several.
        revision: commit, tag or branch. A commit stays what it is; `main` moves.
        column: holds the documents: text, or lists of ints.
        train_split: name of a split.
        eval_split: name of a split; or none, and eval_fraction.
        eval_fraction: share of the training documents held out instead.
        streaming: read over the network during training, instead of downloading and tokenising all of it first.
        download: fetch what is not on this machine yet.
    """

    def __init__(
        self,
        *,
        name: str,
        revision: str,
        column: str,
        train_split: str,
        config: str | None = None,
        eval_split: str | None = None,
        eval_fraction: float | None = None,
        streaming: bool = False,
        download: bool = False,
    ) -> None:
        super().__init__(column=column, eval_fraction=eval_fraction, streaming=streaming)
        check_one_eval(name, eval_split=eval_split, eval_fraction=eval_fraction)
        self.name, self.config, self.revision = name, config, revision
        self.train_split, self.eval_split = train_split, eval_split
        self.download = download

    def __str__(self) -> str:
        return f"dataset {self.name}"

    def identity(self) -> dict[str, Any]:
        names = ("name", "config", "revision", "column", "train_split", "eval_split", "eval_fraction", "streaming")
        return {name: getattr(self, name) for name in names}

    def open(self) -> OpenCorpus:
        online = may_download(self.download)
        if not self.streaming:
            try:
                with datasets_offline():
                    return self.load(offline=True)
            except ValueError:
                if not online:
                    raise
        elif not online:
            raise ValueError(f"{not_here('dataset', self.name, download=self.download)} (Streaming needs the hub.)")
        check_on_hub("dataset", self.name, self.revision)
        return self.load(offline=False)

    def load(self, *, offline: bool) -> OpenCorpus:
        splits = [self.train_split, *([] if self.eval_split is None else [self.eval_split])]
        train, *own = [self.load_split(split, offline=offline) for split in splits]
        return OpenCorpus(train, own[0] if own else None)

    def load_split(self, split: str, *, offline: bool) -> Documents:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            documents = load_dataset(
                self.name, self.config, split=split, revision=self.revision, streaming=self.streaming
            )
        except (ConnectionError, FileNotFoundError, DatasetsError) as error:
            if offline:
                raise ValueError(not_here("dataset", self.name, download=self.download)) from error
            raise ValueError(f"The {self} cannot be read: {error}") from error
        except ValueError as error:
            raise ValueError(f"The {self} cannot be read: {error}") from error
        if offline:
            check_cached_revision(documents, self.name, self.revision)
        return documents


class LocalFiles(Corpus):
    """Files on this machine.

    Args:
        format: `text`: every file is one document, in a column called text; `json`: one object per line, or a list of
            objects; `parquet`.
        column: holds the documents: text, or lists of ints.
        train: files, as paths or glob patterns.
        eval: files; or none, and eval_fraction.
        eval_fraction: share of the training documents held out instead.
        streaming: read the files during training, instead of tokenising them once.
    """

    def __init__(
        self,
        *,
        format: Literal["text", "json", "parquet"],
        column: str,
        train: Sequence[str],
        eval: Sequence[str] | None = None,
        eval_fraction: float | None = None,
        streaming: bool = False,
    ) -> None:
        super().__init__(column=column, eval_fraction=eval_fraction, streaming=streaming)
        if format not in ("text", "json", "parquet"):
            raise ValueError(f"format must be text, json or parquet, got {format!r}.")
        check_one_eval("LocalFiles", eval_split=eval, eval_fraction=eval_fraction)
        self.format = format
        self.train = matching_files(train)
        self.eval = None if eval is None else matching_files(eval)
        if both := set(self.train) & set(self.eval or ()):
            raise ValueError(f"Files are named for training and for evaluation: {', '.join(map(str, sorted(both)))}.")

    def __str__(self) -> str:
        return f"{len(self.train) + len(self.eval or ())} local {self.format} file(s)"

    def identity(self) -> dict[str, Any]:
        identity = {name: getattr(self, name) for name in ("format", "column", "eval_fraction", "streaming")}
        return {**identity, "train": digest_of_files(self.train), "eval": digest_of_files(self.eval or ())}

    def open(self) -> OpenCorpus:
        return OpenCorpus(self.load(self.train), None if self.eval is None else self.load(self.eval))

    def load(self, files: Sequence[Path]) -> Documents:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        # Read as a stream in either case: a file that is read once needs no copy in the cache of `datasets`.
        options: dict[str, Any] = {"sample_by": "document"} if self.format == "text" else {}
        names = {"train": [escape(str(file)) for file in files]}
        try:
            return load_dataset(self.format, data_files=names, split="train", streaming=True, **options)
        except (OSError, ValueError, StopIteration, DatasetsError) as error:
            raise ValueError(f"The {self} cannot be read: {str(error) or 'nothing is in them'}") from error


class PythonStandardLibrary(Corpus):
    """The source text of the Python standard library on this machine: a corpus that needs no network.

    Every .py file in UTF-8 is a document; tests and installed packages are left out. About 12 MB.

    Args:
        eval_fraction: share of the files held out for evaluation.
    """

    def __init__(self, *, eval_fraction: float) -> None:
        super().__init__(column="text", eval_fraction=eval_fraction, streaming=False)
        self.folder = Path(sysconfig.get_path("stdlib"))

    def __str__(self) -> str:
        return f"Python {platform.python_version()} standard library"

    def identity(self) -> dict[str, Any]:
        sizes = [(file.relative_to(self.folder).as_posix(), file.stat().st_size) for file in self.files()]
        python = f"{platform.python_implementation()} {platform.python_version()}"
        return {"python": python, "files": digest(sizes), "eval_fraction": self.eval_fraction}

    def files(self) -> list[Path]:
        found = sorted(self.folder.rglob("*.py"))
        return [file for file in found if not NOT_THE_LIBRARY & set(file.relative_to(self.folder).parts)]

    def open(self) -> OpenCorpus:
        from datasets import Dataset

        texts = []
        for file in self.files():
            try:
                texts.append(file.read_bytes().decode())
            except UnicodeDecodeError:
                continue
        if not texts:
            raise ValueError(f"No source text of the Python standard library is in {self.folder}: use other data.")
        return OpenCorpus(Dataset.from_dict({"text": texts}), None)


def check_one_eval(name: str, *, eval_split: Any, eval_fraction: float | None) -> None:
    if (eval_split is None) == (eval_fraction is None):
        raise ValueError(
            f"{name} needs either evaluation data of its own or eval_fraction, not both and not neither; got "
            f"{eval_split} and eval_fraction {eval_fraction}."
        )


def check_cached_revision(documents: Any, name: str, revision: str) -> None:
    """Without the hub, `datasets` takes the newest copy it has of a dataset, whatever revision was asked for."""
    files = [file["filename"] for file in documents.cache_files]
    if re.fullmatch("[0-9a-f]{40}", revision) and not all(revision in file for file in files):
        raise ValueError(
            f"The copy of {name} on this machine is not of revision {revision}: {files[0]}. Download that revision "
            "(download: true), or name the one that is here."
        )


def matching_files(patterns: Sequence[str]) -> list[Path]:
    """The files of paths and patterns, absolute and in order; one that fits no file is an error."""
    files: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser().absolute()
        # A path may hold the signs of a pattern.
        found = [path] if path.is_file() else [Path(p) for p in glob(str(path), recursive=True) if Path(p).is_file()]
        if not found:
            raise ValueError(f"No file at {path}.")
        files.update(found)
    if not files:
        raise ValueError("The list of files is empty.")
    return sorted(files)


def digest_of_files(files: Sequence[Path]) -> str:
    return digest([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def digest(values: Sequence[tuple[Any, ...]]) -> str:
    return hashlib.sha256(repr(list(values)).encode()).hexdigest()
