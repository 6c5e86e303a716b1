"""What a sweep varies, and whether its jobs can work: known before the first of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from pdlightning.config import ConfigError
from pdlightning.resume import SEARCHES
from pdlightning.schema import check_settings

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.types import Override


def varied(config: DictConfig) -> list[Override]:
    """What the presets and the command line say, the last word of each setting."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    params: dict[str, Any] = OmegaConf.to_container(config.hydra.sweeper.params or OmegaConf.create({}))  # type: ignore[assignment]
    words = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    parsed = OverridesParser.create(config_loader=config_loader()).parse_overrides(words)
    return list({override.key_or_group: override for override in parsed}.values())


def is_search(config: DictConfig) -> bool:
    return config.hydra.sweeper._target_.startswith(SEARCHES)


def config_loader() -> ConfigLoader:
    from hydra.core.global_hydra import GlobalHydra

    return GlobalHydra.instance().config_loader()


def jobs_of(config: DictConfig) -> list[list[str]]:
    """The words of every job; of a search those of one, for what the others say is decided on the way."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    overrides = varied(config)
    if not is_search(config):
        return BasicSweeper.split_arguments(overrides, None)[0]
    return [
        [f"{o.get_key_element()}={first_value(o)}" if o.is_sweep_override() else o.input_line or "" for o in overrides]
    ]


def first_value(override: Override) -> Any:
    from hydra.core.override_parser.types import IntervalSweep

    value = override.value()
    return value.start if isinstance(value, IntervalSweep) else next(iter(override.sweep_string_iterator()))


def check_jobs(config: DictConfig) -> None:
    """Every value of a setting is there once, every job composes, and its settings are what they should be."""
    axes = {override.key_or_group: override for override in varied(config) if override.is_sweep_override()}
    for axis in axes.values():
        if axis.is_discrete_sweep():
            values = list(axis.sweep_iterator())
            if twice := [value for i, value in enumerate(values) if value in values[:i]]:
                raise ConfigError(
                    f"{axis.input_line}: {axis.key_or_group}={twice[0]} is there twice, so two jobs would be the same."
                )
    for words, plain in samples(config, axes.values()):
        try:
            check_settings(plain)
        except ConfigError as error:
            own = [word for word in words if word.split("=")[0].lstrip("+") in axes]
            raise ConfigError(f"The job {' '.join(own)}: {error}") from error


def samples(config: DictConfig, axes: Iterable[Override]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Words and config of the first job, and of as few others as have every value of every axis."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    first = jobs_of(config)[0]
    yield first, (plain := composed(config, first))
    for axis in axes:
        key = axis.get_key_element()
        (place,) = (i for i, word in enumerate(first) if word.startswith(f"{key}="))
        for value in axis.sweep_string_iterator() if axis.is_discrete_sweep() else ():
            words = [*first[:place], f"{key}={value}", *first[place + 1 :]]
            if config_loader().get_group_options(axis.key_or_group):
                yield words, composed(config, words)
            else:  # composing takes a tenth of a second
                yield words, with_value(plain, axis.key_or_group, OverridesParser.create().parse_override(words[place]))


def composed(config: DictConfig, words: list[str]) -> dict[str, Any]:
    from pdlightning.commands import plain_config

    job = config_loader().load_sweep_config(config, words)
    plain = plain_config(OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"]))
    del plain["resume"]
    return plain


def with_value(plain: dict[str, Any], key: str, override: Override) -> dict[str, Any]:
    """A config in which one setting has another value; what refers to it is as it was."""
    new = copy.deepcopy(plain)
    *path, last = key.split(".")
    node: Any = new
    for part in path:
        node = node[part]
    node[last] = override.value()
    return new
