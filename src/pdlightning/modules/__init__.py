"""nn.Modules: sites and components, the component model, the ci functions."""

from pdlightning.modules.chunkwise_transformer import ChunkwiseTransformer
from pdlightning.modules.ci import CausalImportances, CIFunction, CIShape, Squash
from pdlightning.modules.component_model import ComponentModel, Run
from pdlightning.modules.global_transformer import GlobalTransformer
from pdlightning.modules.mlp_ci import GlobalMLP, ScalarMLP, SharedMLP, VectorMLP
from pdlightning.modules.reverse_residual import ReverseResidual
from pdlightning.modules.sequence_blocks import AttentionSettings
from pdlightning.modules.site import Components, Site

__all__ = [
    "AttentionSettings",
    "CIFunction",
    "CIShape",
    "CausalImportances",
    "ChunkwiseTransformer",
    "ComponentModel",
    "Components",
    "GlobalMLP",
    "GlobalTransformer",
    "ReverseResidual",
    "Run",
    "ScalarMLP",
    "SharedMLP",
    "Site",
    "Squash",
    "VectorMLP",
]
