"""Data of the experiments: LightningDataModules whose batches are functions of (seed, stream, step, sample)."""

from pdlightning.data.corpus import Corpus, HubDataset, LocalFiles, PythonStandardLibrary
from pdlightning.data.induction import InductionTokens
from pdlightning.data.keyed import Batch, KeyedDataModule, Stream
from pdlightning.data.labels import AbsoluteLabels, ResidualActivationLabels
from pdlightning.data.sparse import SparseFeatures
from pdlightning.data.tokenizers import ByteTokenizer, PlainIds, PretrainedTokenizer, Tokenizer, TrainedTokenizer
from pdlightning.data.tokens import Tokens, check_context, check_vocabulary

__all__ = [
    "AbsoluteLabels",
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "HubDataset",
    "InductionTokens",
    "KeyedDataModule",
    "LocalFiles",
    "PlainIds",
    "PretrainedTokenizer",
    "PythonStandardLibrary",
    "ResidualActivationLabels",
    "SparseFeatures",
    "Stream",
    "Tokenizer",
    "Tokens",
    "TrainedTokenizer",
    "check_context",
    "check_vocabulary",
]
