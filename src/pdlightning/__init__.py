"""Parameter decomposition in PyTorch Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdlightning.decomposition import ParameterDecomposition
    from pdlightning.loading import load_run

__all__ = ["ParameterDecomposition", "load_run"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """torch and lightning are imported by the first use, so that `import pdlightning` and `--help` answer at once."""
    if name == "ParameterDecomposition":
        from pdlightning.decomposition import ParameterDecomposition

        return ParameterDecomposition
    if name == "load_run":
        from pdlightning.loading import load_run

        return load_run
    raise AttributeError(f"module 'pdlightning' has no attribute {name!r}")
