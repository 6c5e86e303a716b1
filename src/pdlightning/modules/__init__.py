"""nn.Modules: sites and components, the component model, the ci functions."""

from pdlightning.modules.ci import CausalImportances, CIFunction, CIShape, Squash
from pdlightning.modules.component_model import ComponentModel, Run
from pdlightning.modules.mlp_ci import GlobalMLP, ScalarMLP, SharedMLP, VectorMLP
from pdlightning.modules.site import Components, Site

__all__ = [
    "CIFunction",
    "CIShape",
    "CausalImportances",
    "ComponentModel",
    "Components",
    "GlobalMLP",
    "Run",
    "ScalarMLP",
    "SharedMLP",
    "Site",
    "Squash",
    "VectorMLP",
]
