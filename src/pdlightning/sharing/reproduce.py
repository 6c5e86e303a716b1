"""The command that makes a run again, found by comparing its config with what the experiments of this version say."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdlightning.config import ConfigError, to_plain

Config = dict[str, Any]

ELSEWHERE = ("logging", "cache_dir", "only")
"""Parts of a config that decide nothing about the weights and the numbers."""

REFERRING = ("losses", "ci_fn", "seed", "compile")
"""Settings of `pd` that the config tree takes from its top; they follow what is said there."""

PLAIN_WORD = re.compile(r"[A-Za-z_][\w./-]*")
KEY = re.compile(r"[\w-]+")


def command_of(config: Config) -> str | None:
    """`python -m pdlightning experiment=... key=value ...`, checked to compose to `config`; None if there is none."""
    words = words_of(without(config, ELSEWHERE))
    return None if words is None else shlex.join(["python", "-m", "pdlightning", *words])


def words_of(config: Config) -> list[str] | None:
    """Those of `metric=none` too: the command line cannot name every evaluation, to take it away."""
    chosen = [f"experiment={config['name']}"]
    return words_from(chosen, config) or words_from([*chosen, "metric=none"], config)


def words_from(chosen: list[str], config: Config) -> list[str] | None:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    words = list(chosen)
    try:
        # What refers to other parts follows them, so it is looked at last.
        for skipped in (REFERRING, ()):
            there, here = (shown(c, skipped) for c in (composed(words), config))
            words += list(differences(there, here, ()))
        return words if composed(words) == config else None
    except (HydraException, OmegaConfBaseException, ConfigError, KeyError):  # not a config of the tree as it is now
        return None


def composed(words: list[str]) -> Config:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    of_this_process = GlobalHydra.instance()
    going_on = of_this_process.hydra
    of_this_process.clear()  # a run asks at its end, inside Hydra, which knows one config tree at a time
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            config = to_plain(compose("config", words))
    finally:
        of_this_process.hydra = going_on
    return without(config, (*ELSEWHERE, "resume"))


def conf_folder() -> Path:
    from pdlightning.__main__ import CONF

    return CONF


def without(config: Config, keys: tuple[str, ...]) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


def shown(config: Config, skipped: tuple[str, ...]) -> Config:
    return {**config, "pd": without(config["pd"], skipped)}


def differences(there: Any, here: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Overrides that make `there` into `here`.

    Raises:
        KeyError: a key that the command line cannot name.
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            if key not in here:
                yield f"~{name_of((*path, key))}"
            elif key not in there:
                yield f"+{name_of((*path, key))}={written(here[key])}"
            else:
                yield from differences(there[key], here[key], (*path, key))
    elif there != here or type(there) is not type(here):
        yield f"{name_of(path)}={written(here)}"


def name_of(path: tuple[str, ...]) -> str:
    for key in path:
        if not KEY.fullmatch(key):
            raise KeyError(key)
    return ".".join(path)


def written(value: Any) -> str:
    """A value as Hydra's command line reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name_of((key,))}:{written(inner)}" for key, inner in value.items()) + "}"
    if PLAIN_WORD.fullmatch(value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
