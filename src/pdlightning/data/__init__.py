"""Data of the experiments: LightningDataModules whose batches are functions of (seed, stream, step, sample)."""

from pdlightning.data.induction import InductionTokens
from pdlightning.data.keyed import Batch, KeyedDataModule, Stream
from pdlightning.data.labels import AbsoluteLabels, ResidualActivationLabels
from pdlightning.data.sparse import SparseFeatures

__all__ = [
    "AbsoluteLabels",
    "Batch",
    "InductionTokens",
    "KeyedDataModule",
    "ResidualActivationLabels",
    "SparseFeatures",
    "Stream",
]
