"""A finished run: exported as safetensors and JSON, and given back by `load_run` from wherever it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdlightning.build import (
    Config,
    Target,
    build_data,
    build_decomposition,
    build_evaluation,
    build_target,
    make_target,
    mistakes_of_the_user,
    validate_config,
)
from pdlightning.decomposition import ParameterDecomposition
from pdlightning.masking.held import ascent_state
from pdlightning.runtime import mixed_precision
from pdlightning.schema import complete
from pdlightning.sharing.places import DECOMPOSITION, HubRepo, WandBRun, place_of
from pdlightning.sharing.stored import TARGET, StoredRun, read
from pdlightning.sharing.trust import Budget, of_a_stranger, refuse_other_sites
from pdlightning.storage import StorageError, run_environment, save_decomposition, weights_sha256
from pdlightning.targets import Recipe


def export_decomposition(
    folder: Path,
    decomposition: ParameterDecomposition,
    state: Mapping[str, Tensor],
    *,
    config: Config,
    target: Target,
    summary: dict[str, Any],
) -> None:
    """V, U and the ci function, and all it takes to load them again without the folder of the run around them.

    The target's weights come along only where we trained it ourselves (design decision 7). `state` is that of the
    decomposition over all ranks. Persistent sources, which the losses are measured with, come along; what only their
    ascents need does not.
    """
    further = ascent_state(decomposition)
    tensors = {name: tensor for name, tensor in state.items() if name not in further}
    if target.folder is not None:
        decomposition.model.restore()
        tensors |= {TARGET + name: value for name, value in target.model.state_dict().items()}
    environment = {key: value for key, value in run_environment().items() if key != "machine"}  # a private name
    metadata = {
        "sites": describe_sites(decomposition),
        "ci_fn": config["pd"]["ci_fn"],
        "target": {"weights": where_weights_are(target), **target.summary},
        "config": config,
        "summary": summary,
        "environment": environment,
    }
    save_decomposition(folder / DECOMPOSITION, tensors, metadata)


def where_weights_are(target: Target) -> str:
    """`included` among the tensors, on the `hub` (or in a folder: `loaded_from` says which), or as the config makes."""
    if target.folder is not None:
        return "included"
    return "hub" if "loaded_from" in target.summary else "config"


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
        folder: where it is on this machine: the folder of the run, or of its decomposition where that is all there is.
        config: resolved, as it was run; of a run from elsewhere without `allow`, `cache_dir` and loggers.
        decomposition: target rebuilt, weights loaded, in eval mode.
        step: the number of steps behind these weights.
        summary: the content of `summary.json`; empty for a run that has not ended, and for an earlier step.
    """

    folder: Path
    config: Config
    decomposition: ParameterDecomposition
    step: int
    summary: dict[str, Any]

    def __repr__(self) -> str:
        sites = ", ".join(f"{path} C={components.C}" for path, components in self.decomposition.components.items())
        return f"LoadedRun({self.config['name']}, step {self.step}, {sites}; {self.folder})"

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

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Put the decomposition, its config, numbers and a model card on the Hugging Face hub; the commit's address.

        Raises:
            StorageError: the run has not ended; the hub cannot be reached, or does not let us.
        """
        from pdlightning.sharing.publish import push_run

        return push_run(self.folder, repo_id, private=private, token=token)


def load_run(
    spec: str | Path, *, step: int | None = None, device: str | torch.device = "cpu", allow: Iterable[str] = ()
) -> LoadedRun:
    """Give back a run from wherever it is.

    Args:
        spec: the folder of a run; its `decomposition/`; a checkpoint in it; a folder that Weights & Biases wrote; a
            run on its server (`entity/project/run_id`, also after `wandb:`, or the address of its page); a repository
            on the Hugging Face hub (`user/name`, `user/name@revision`, also after `hf:`, or the address of its page).
            What is on this machine comes first.
        step: of a checkpoint; None: the end of the run, or the newest checkpoint where it has not ended.
        device: where the decomposition and its target go.
        allow: further packages that may be built from. The config of a run folder on this machine says so itself, as
            the user's own; that of any other place is a stranger's, and its own list counts for nothing.

    Raises:
        StorageError: there is no such run, it cannot be had, a file of it is damaged or names what is not built for a
            stranger; the message says which and what to do.
        ConfigError: its config is not one that this version of pdlightning can build.
    """
    device = usable_device(device)
    place = place_of(spec)
    stored = read(place, step=step)
    with nullcontext() if stored.own else in_words(stored.origin):
        config = buildable_config(stored, allow=allow, download=isinstance(place, WandBRun | HubRepo))
        if stored.sites is not None:
            refuse_other_sites(config, stored.sites, stored.state, origin=stored.origin)
        with mistakes_of_the_user():
            decomposition = rebuild(stored, config)
    load_state(decomposition, stored.state, origin=stored.origin)
    decomposition.set_progress(min(stored.step, config["steps"] - 1))
    return LoadedRun(stored.folder, config, decomposition.to(device).eval(), stored.step, stored.summary)


@contextmanager
def in_words(origin: str) -> Iterator[None]:
    """A stranger's config can be wrong in ways that no check of ours has a sentence for."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"{origin}: no decomposition can be built from its config ({type(error).__name__}: {error})."
        ) from error


def buildable_config(stored: StoredRun, *, allow: Iterable[str], download: bool) -> Config:
    """The stored config, completed and checked. Who asks for a run from the network has asked for its target too."""
    config = complete(stored.config)
    if not stored.own:
        config = of_a_stranger(config, allow=allow, origin=stored.origin)
    elif further := list(allow):
        config["allow"] = [*config.get("allow", []), *further]
    validate_config(config)
    if download and "download" in config["target"]:
        config["target"] = {**config["target"], "download": True}
    return config


def rebuild(stored: StoredRun, config: Config) -> ParameterDecomposition:
    """The decomposition around its target, its own weights not yet loaded."""
    bounded = nullcontext if stored.own else partial(Budget, {**stored.state, **(stored.target or {})}, stored.origin)
    with nullcontext() if "download" in config["target"] else bounded():  # a pretrained model is as large as it is
        source = build_target(config)
    if isinstance(source, Recipe) and stored.target is not None:
        with bounded():
            target = source.blank(recorded_seed(stored))
        load_state(target, stored.target, origin=f"{stored.origin}, the target")
    elif isinstance(source, Recipe) and not stored.own:
        raise StorageError(
            f"{stored.origin}: its config trains a target, and the weights of that target are not there. It cannot be "
            "loaded without them."
        )
    else:
        target = make_target(config, source).model
        refuse_other_target(target, stored)
    with bounded():
        return build_decomposition(config, target)


def recorded_seed(stored: StoredRun) -> int:
    """Of the attempt that gave the target; what a network fixes at random comes from it."""
    seed = None if stored.target_record is None else stored.target_record.get("seed")
    if not isinstance(seed, int):
        raise StorageError(f"{stored.origin}: its metadata has no target.seed, so its target cannot be rebuilt.")
    return seed


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, origin: str) -> None:
    """All tensors of a module, of the same names and shapes."""
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:6]]
        raise StorageError(
            f"{origin}: its tensors are not those of the model that its config describes:\n  " + "\n  ".join(reasons)
        ) from error


def refuse_other_target(target: nn.Module, stored: StoredRun) -> None:
    """A target that is made or fetched again must be the one that was decomposed."""
    recorded = None if stored.target_record is None else stored.target_record.get("sha256")
    if recorded is not None and weights_sha256(target) != recorded:  # the first runs did not record it
        raise StorageError(
            f"{stored.origin}: its target has other weights now than when it was decomposed (sha256 "
            f"{weights_sha256(target)[:12]}, and {str(recorded)[:12]} then): "
            f"{stored.target_record and stored.target_record.get('loaded_from', 'it is made by the config')}."
        )


def usable_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error
