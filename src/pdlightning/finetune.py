"""Fine-tuning: a run that starts with V, U and the ci function of another run (`init_from=RUN`)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities import rank_zero_info
from torch import Tensor

from pdlightning.build import Config, Target
from pdlightning.config import ConfigError
from pdlightning.decomposition import ParameterDecomposition
from pdlightning.loading import buildable_config, describe_sites
from pdlightning.sharing.places import place_of
from pdlightning.sharing.stored import StoredRun, read
from pdlightning.storage import StorageError

TAKEN = ("model.components.", "model.ci_fn.")
ONLY_HOW = ("checkpoint_activations",)
"""Arguments of a ci function that decide how it is computed, not what."""


@dataclass(frozen=True)
class Start:
    """A finished run, whose V, U and ci function another run starts with."""

    stored: StoredRun
    config: Config

    def check(self, decomposition: ParameterDecomposition, config: Config) -> None:
        """Refuse a decomposition that is not of the same sites, C, squash and ci function; the error lists it all."""
        pd = {**defaults(ParameterDecomposition), **self.config["pd"]}
        found = [
            *site_differences(self.stored.sites or {}, describe_sites(decomposition)),
            *value_differences({"squash": pd["squash"]}, {"squash": decomposition.model.squash}),
            *ci_fn_differences(pd["ci_fn"], config["pd"]["ci_fn"], defaults(type(decomposition.model.ci_fn))),
        ] or tensor_differences(self.stored.state, taken_of(decomposition))
        if found:
            raise ConfigError(
                f"init_from: the decomposition of {self.stored.origin} does not fit this run. What differs:\n  "
                + "\n  ".join(found)
            )

    def apply(self, decomposition: ParameterDecomposition, target: Target) -> None:
        """Take V, U and the ci function, and nothing else: no optimizer, sources or step; no faithfulness warmup."""
        taken = {name: self.stored.state[name] for name in taken_of(decomposition)}
        decomposition.load_state_dict({**decomposition.state_dict(), **taken})
        decomposition.faithfulness_warmup = None
        rank_zero_info(
            f"V, U and the ci function are those of {self.stored.origin} after its {self.stored.step} steps; there is "
            "no faithfulness warmup."
        )
        record = self.stored.target_record or {}
        there, here = record.get("sha256", "not recorded"), target.summary["sha256"]
        if there != here:
            rank_zero_info(
                f"The target is not the one they were made for: sha256 of its weights {there[:12]} there, {here[:12]} "
                "here."
            )


def start_of(config: Config) -> Start | None:
    """What `init_from` names, read and checked to be whole; None where a run starts from nothing.

    It may be anywhere `load_run` finds a run. Of its config nothing is built.

    Raises:
        ConfigError: it is no run, or one that has not ended.
        StorageError: it cannot be had, or its decomposition is damaged.
    """
    if config.get("init_from") is None:  # a run stored before there was init_from has no such key
        return None
    try:
        place = place_of(config["init_from"])
    except StorageError as error:
        raise ConfigError(f"init_from: {error}") from error
    stored = read(place, step=None)
    if stored.sites is None:
        raise ConfigError(
            f"init_from: the run in {stored.folder} has not ended, so it has no decomposition to start from. Go on "
            f"with it first: python -m pdlightning resume={stored.folder}"
        )
    return Start(stored, buildable_config(stored, allow=config["allow"], download=False))


def taken_of(decomposition: ParameterDecomposition) -> dict[str, Tensor]:
    """The tensors of a decomposition that a start replaces."""
    return {name: tensor for name, tensor in decomposition.state_dict().items() if name.startswith(TAKEN)}


def defaults(cls: type) -> dict[str, Any]:
    """The arguments a config may leave out, so that leaving one out and saying its default are the same."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def site_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for path in dict.fromkeys([*there, *here]):
        if path in there and path in here:
            yield from (f"site {path}: {line}" for line in value_differences(there[path], here[path]))
        else:
            yield f"site {path}: only {'there' if path in there else 'here'}"
    if there.keys() == here.keys() and list(there) != list(here):
        yield f"sites in the order {', '.join(there)} there, {', '.join(here)} here"


def ci_fn_differences(there: Mapping[str, Any], here: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Between two nodes of a config; of another class only that."""
    if there["_target_"] != here["_target_"]:
        yield f"ci_fn {there['_target_']} there, {here['_target_']} here"
        return
    said = ({k: v for k, v in {**defaults, **node}.items() if k not in ONLY_HOW} for node in (there, here))
    yield from (f"ci_fn: {line}" for line in value_differences(*said))


def value_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*there, *here]):
        one, other = (values.get(key, "absent") for values in (there, here))
        if one != other:
            yield f"{key} {one} there, {other} here"


def tensor_differences(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> list[str]:
    """What the settings did not tell: tensors that a state of the same settings should have, and their shapes."""
    shapes = ({n: tuple(t.shape) for n, t in tensors.items() if n.startswith(TAKEN)} for tensors in (there, here))
    return list(value_differences(*shapes))
