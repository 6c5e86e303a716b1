"""A finished run: exported as safetensors and JSON, and given back by `load_run`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from pdlightning.build import (
    Config,
    Target,
    build_data,
    build_decomposition,
    build_evaluation,
    build_target,
    make_target,
    validate_config,
)
from pdlightning.checkpoints import AtomicCheckpointIO, checkpoint_step, latest_checkpoint
from pdlightning.config import flatten
from pdlightning.decomposition import ParameterDecomposition
from pdlightning.masking.held import ascent_state
from pdlightning.resume import CONFIG, SUMMARY
from pdlightning.runtime import mixed_precision
from pdlightning.schema import complete
from pdlightning.storage import StorageError, load_decomposition, save_decomposition
from pdlightning.targets import Recipe

DECOMPOSITION = "decomposition"
TARGET = "target."


def export_decomposition(
    folder: Path,
    decomposition: ParameterDecomposition,
    state: Mapping[str, Tensor],
    *,
    config: Config,
    target: Target,
    summary: dict[str, Any],
) -> None:
    """V, U and the ci function; the target's weights only where we trained it ourselves (design decision 7).

    `state` is that of the decomposition over all ranks.

    Persistent sources, which the losses are measured with, come along; what only their ascents need does not.
    """
    further = ascent_state(decomposition)
    tensors = {name: tensor for name, tensor in state.items() if name not in further}
    if target.folder is not None:
        decomposition.model.restore()
        tensors |= {TARGET + name: value for name, value in target.model.state_dict().items()}
    sites = describe_sites(decomposition)
    metadata = {"sites": sites, "target": target.summary, "config": config, "summary": summary}
    save_decomposition(folder / DECOMPOSITION, tensors, metadata)


def describe_sites(decomposition: ParameterDecomposition) -> dict[str, dict[str, Any]]:
    """site -> its kind and sizes, as plain values."""
    return {
        path: {"kind": c.kind, "d_in": c.d_in, "d_out": c.d_out, "C": c.C}
        for path, c in decomposition.components.items()
    }


@dataclass(frozen=True)
class LoadedRun:
    """A run from disk.

    Attributes:
        folder: where it is.
        config: resolved, as it was run.
        decomposition: target rebuilt, weights loaded, in eval mode on the CPU.
        step: the number of steps behind these weights.
        summary: the content of `summary.json`; empty for a run that has not ended.
    """

    folder: Path
    config: Config
    decomposition: ParameterDecomposition
    step: int
    summary: dict[str, Any]

    def evaluate(self) -> dict[str, float]:
        """All numbers of an evaluation at `step`, measured again.

        For a finished run they equal `summary["metrics"]` bit for bit on the same kind of machine with as many threads.
        """
        evaluation = build_evaluation(self.config)
        evaluation.prepare(self.decomposition)
        evaluation.precision = partial(
            mixed_precision, self.config["runtime"]["precision"], device=self.decomposition.device
        )
        evaluation.measure_again(self.decomposition, build_data(self.config).val_dataloader(), step=self.step)
        return evaluation.latest


def load_run(path: str | Path) -> LoadedRun:
    """Give back the run in a folder such as `outputs/tms_5-2/2026-01-31_12-00-00`.

    A run that has not ended is loaded from its newest complete checkpoint, with an empty summary.

    Raises:
        StorageError: the folder is no run, or a file of it is damaged; the message says which and what to do.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise StorageError(f"{folder.absolute()} is not the folder of a run: it has no {CONFIG}.")
    stored: Config = _read(folder / CONFIG, yaml.safe_load)
    config = complete(stored)
    validate_config(config)
    if not (folder / SUMMARY).is_file():
        checkpoint = latest_checkpoint(folder)
        content = AtomicCheckpointIO().load_checkpoint(checkpoint)
        _check_same_config(folder, stored, content["pdlightning_config"])
        target = make_target(config, build_target(config)).model
        return _loaded(folder, config, target, content["state_dict"], checkpoint_step(checkpoint), {})
    summary = _read(folder / SUMMARY, json.loads)
    tensors, metadata = load_decomposition(folder / DECOMPOSITION)
    _check_same_config(folder, stored, metadata["config"])
    weights = {name.removeprefix(TARGET): t for name, t in tensors.items() if name.startswith(TARGET)}
    state = {name: t for name, t in tensors.items() if not name.startswith(TARGET)}
    source = build_target(config)
    if isinstance(source, Recipe):
        target = source.blank(metadata["target"]["seed"])
        target.load_state_dict(weights)
    else:
        target = source
    return _loaded(folder, config, target, state, config["steps"], summary)


def _loaded(
    folder: Path, config: Config, target: nn.Module, state: dict[str, Tensor], step: int, summary: dict[str, Any]
) -> LoadedRun:
    decomposition = build_decomposition(config, target)
    decomposition.load_state_dict(state)
    decomposition.set_progress(min(step, config["steps"] - 1))
    return LoadedRun(folder, config, decomposition.eval(), step, summary)


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        content = parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise StorageError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise StorageError(f"{path} is damaged: expected a mapping, got {content!r:.80}.")
    return content


def _check_same_config(folder: Path, config: Config, stored: Config) -> None:
    """The weights belong to the config they were made with, of which they carry a copy."""
    here, there = flatten(config), flatten(stored)
    differing = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
    # A resumed run may compute on other devices.
    changed = [key for key in differing if not key.startswith("runtime.")]
    if changed:
        raise StorageError(
            f"{folder / CONFIG} was changed after the run ({', '.join(changed[:5])}), so it does not describe these "
            "weights. Put it back."
        )
