"""What one does with a decomposition by hand: intervene in it, and write an edited model (docs/editing.md)."""

from pdlightning.editing.exporting import export, load_exported
from pdlightning.editing.interventions import Intervention
from pdlightning.editing.methods import Editing

__all__ = ["Editing", "Intervention", "export", "load_exported"]
