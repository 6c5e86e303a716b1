"""Every loss and every evaluation: one torchmetrics.Metric each, thin over `pdlightning.functional`.

The figures are in `pdlightning.metrics.figures`, which needs matplotlib.
"""

from pdlightning.metrics.attention import AttentionPatternKL
from pdlightning.metrics.comparisons import Comparison, HiddenMSE, OutputKL, OutputMSE
from pdlightning.metrics.evaluation import CIL0, ActiveSubcomponents, Evaluation, HiddenActsError
from pdlightning.metrics.examples import TopExamples
from pdlightning.metrics.faithfulness import FaithfulnessLoss
from pdlightning.metrics.importance import ImportanceMinimalityLoss, SmoothL0Loss
from pdlightning.metrics.ladder import PGDLadder
from pdlightning.metrics.language import CEandKL
from pdlightning.metrics.loss import Loss
from pdlightning.metrics.merged import MergedReconstructionLoss
from pdlightning.metrics.multi_batch import MultiBatchPGD
from pdlightning.metrics.probe import DenseError, IdentityError, WeightMatch
from pdlightning.metrics.reconstruction import ReconstructionLoss
from pdlightning.metrics.sites import SiteTable

__all__ = [
    "CIL0",
    "ActiveSubcomponents",
    "AttentionPatternKL",
    "CEandKL",
    "Comparison",
    "DenseError",
    "Evaluation",
    "FaithfulnessLoss",
    "HiddenActsError",
    "HiddenMSE",
    "IdentityError",
    "ImportanceMinimalityLoss",
    "Loss",
    "MergedReconstructionLoss",
    "MultiBatchPGD",
    "OutputKL",
    "OutputMSE",
    "PGDLadder",
    "ReconstructionLoss",
    "SiteTable",
    "SmoothL0Loss",
    "TopExamples",
    "WeightMatch",
]
