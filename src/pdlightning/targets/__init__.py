"""The networks we decompose: how they are built, trained, checked and kept."""

from pdlightning.targets.checks import CheckResult, FeaturesRepresented, LastPositionAccuracy
from pdlightning.targets.induction import InductionTransformer
from pdlightning.targets.recipe import Recipe, TargetRecipe, Trained, UnfitTargetError
from pdlightning.targets.resid_mlp import ResidMLP
from pdlightning.targets.store import TargetResult, obtain_target
from pdlightning.targets.tms import TMS
from pdlightning.targets.training import TargetTraining, last_position_cross_entropy, train_target

__all__ = [
    "TMS",
    "CheckResult",
    "FeaturesRepresented",
    "InductionTransformer",
    "LastPositionAccuracy",
    "Recipe",
    "ResidMLP",
    "TargetRecipe",
    "TargetResult",
    "TargetTraining",
    "Trained",
    "UnfitTargetError",
    "last_position_cross_entropy",
    "obtain_target",
    "train_target",
]
