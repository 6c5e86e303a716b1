"""Pure functions of tensors: the formulas of docs/algorithm.md, each a few lines under its equation."""

from pdlightning.functional.components import component_forward, interpolate_mask, masked_product
from pdlightning.functional.evals import (
    dense_ci_error,
    dense_order,
    identity_ci_error,
    identity_matching,
    l0,
    mean_l2_ratio,
    mean_max_cosine_similarity,
    permute_to_identity,
    recovered_features,
)
from pdlightning.functional.kl import cross_entropy_pair, kl_divergence, kl_pair
from pdlightning.functional.losses import (
    Pair,
    faithfulness_loss,
    frequency_weighted_sum,
    importance_minimality_loss,
    lp_penalty,
    relative_faithfulness_loss,
    smooth_l0_penalty,
    squared_error,
)
from pdlightning.functional.random import KeyedRandom, key_generator
from pdlightning.functional.routing import subset_routes, uniform_subset_routes
from pdlightning.functional.schedules import ScheduleKind, interpolated_value, schedule_value
from pdlightning.functional.squash import (
    hard_sigmoid,
    leaky_hard_sigmoid,
    lower_leaky_hard_sigmoid,
    swish_hard_sigmoid,
    upper_leaky_hard_sigmoid,
)

__all__ = [
    "KeyedRandom",
    "Pair",
    "ScheduleKind",
    "component_forward",
    "cross_entropy_pair",
    "dense_ci_error",
    "dense_order",
    "faithfulness_loss",
    "frequency_weighted_sum",
    "hard_sigmoid",
    "identity_ci_error",
    "identity_matching",
    "importance_minimality_loss",
    "interpolate_mask",
    "interpolated_value",
    "key_generator",
    "kl_divergence",
    "kl_pair",
    "l0",
    "leaky_hard_sigmoid",
    "lower_leaky_hard_sigmoid",
    "lp_penalty",
    "masked_product",
    "mean_l2_ratio",
    "mean_max_cosine_similarity",
    "permute_to_identity",
    "recovered_features",
    "relative_faithfulness_loss",
    "schedule_value",
    "smooth_l0_penalty",
    "squared_error",
    "subset_routes",
    "swish_hard_sigmoid",
    "uniform_subset_routes",
    "upper_leaky_hard_sigmoid",
]
