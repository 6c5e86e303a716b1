"""A finished run: exported as safetensors and JSON, and given back by `load_run`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from pdlightning.build import (
    Config,
    Target,
    blank_target,
    build_data,
    build_decomposition,
    build_evaluation,
    build_target,
    validate_config,
)
from pdlightning.decomposition import ParameterDecomposition
from pdlightning.resume import CONFIG, SUMMARY
from pdlightning.storage import AtomicCheckpointIO, StorageError, latest_checkpoint, load_decomposition, save_decomposition

DECOMPOSITION = "decomposition"
TARGET = "target."


def export_decomposition(
    folder: Path, decomposition: ParameterDecomposition, *, config: Config, target: Target, summary: dict[str, Any]
) -> None:
    """V, U and the ci function; the target's weights only where we trained it ourselves (design decision 7)."""
    tensors = dict(decomposition.state_dict())
    if target.folder is not None:
        decomposition.model.restore()
        tensors |= {TARGET + name: value for name, value in target.model.state_dict().items()}
    sites = {
        path: {"kind": c.kind, "d_in": c.d_in, "d_out": c.d_out, "C": c.C}
        for path, c in decomposition.components.items()
    }
    metadata = {"sites": sites, "target": target.summary, "config": config, "summary": summary}
    save_decomposition(folder / DECOMPOSITION, tensors, metadata)


@dataclass(frozen=True)
class LoadedRun:
    """A run from disk: its resolved config, the decomposition (target rebuilt, weights loaded), its summary."""

    folder: Path
    config: Config
    decomposition: ParameterDecomposition
    summary: dict[str, Any]

    def evaluate(self) -> dict[str, float]:
        """The numbers of the last evaluation, measured again; equal to `summary["metrics"]` on the same machine."""
        evaluation = build_evaluation(self.config)
        for name, metric in {**evaluation.metrics, **evaluation.slow_metrics}.items():
            metric.term = f"eval/{name}"
            metric.prepare(self.decomposition.model)
        self.decomposition.set_progress(self.config["steps"] - 1)
        numbers, _ = evaluation.evaluate(self.decomposition, build_data(self.config).val_dataloader(), slow=True)
        return {name: value.item() for name, value in numbers.items()}


def load_run(path: str | Path) -> LoadedRun:
    """Give back the run in a folder such as `outputs/tms_5-2/2026-01-31_12-00-00`.

    A run that has not ended is loaded from its newest complete checkpoint, with an empty summary.

    Raises:
        StorageError: the folder is no run, or a file of it is damaged; the message says which and what to do.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise StorageError(f"{folder} is not the folder of a run: it has no {CONFIG}.")
    config: Config = yaml.safe_load((folder / CONFIG).read_text())
    validate_config(config)
    summary: dict[str, Any] = {}
    if (folder / SUMMARY).is_file():
        summary = json.loads((folder / SUMMARY).read_text())
        tensors, metadata = load_decomposition(folder / DECOMPOSITION)
        weights = {name.removeprefix(TARGET): t for name, t in tensors.items() if name.startswith(TARGET)}
        state = {name: t for name, t in tensors.items() if not name.startswith(TARGET)}
        if weights:
            model = blank_target(config, metadata["target"]["seed"])
            model.load_state_dict(weights)
        else:
            model = build_target(config).model
    else:
        state = _checkpoint_state(folder)
        model = build_target(config).model
    decomposition = build_decomposition(config, model)
    decomposition.load_state_dict(state)
    return LoadedRun(folder, config, decomposition.eval(), summary)


def _checkpoint_state(folder: Path) -> dict[str, Tensor]:
    return AtomicCheckpointIO().load_checkpoint(latest_checkpoint(folder))["state_dict"]
