"""Figures of a decomposition. Functions return a `matplotlib.figure.Figure`; none writes a file or needs a display."""

from pdlightning.figures.curves import plot_training_curves
from pdlightning.figures.importance import plot_firing_density, plot_histograms, plot_mean_ci
from pdlightning.figures.neurons import plot_neuron_contributions_by_subcomponent
from pdlightning.figures.positions import plot_l0_by_position
from pdlightning.figures.probe import plot_single_feature_ci
from pdlightning.figures.vectors import plot_tms_vectors
from pdlightning.figures.weights import plot_component_weights

__all__ = [
    "plot_component_weights",
    "plot_firing_density",
    "plot_histograms",
    "plot_l0_by_position",
    "plot_mean_ci",
    "plot_neuron_contributions_by_subcomponent",
    "plot_single_feature_ci",
    "plot_tms_vectors",
    "plot_training_curves",
]
