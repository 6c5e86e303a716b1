"""What is wrong with a command line that Hydra refused, in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf.errors import InterpolationToMissingValueError

from pdlightning.config import ConfigError, suggest, to_plain

EXTRAS = {
    "hydra/sweeper/optuna": ("Optuna, which searches,", "optuna"),
    "hydra/launcher/submitit_slurm": ("Submitit, which submits jobs to SLURM,", "slurm"),
}
"""Parts of Hydra that come with an extra: what is missing, and which extra has it."""


def explain_refusal(error: Exception, arguments: Sequence[str], config_dir: Path) -> str:
    """A sentence on why Hydra would not compose the config of a command line."""
    if isinstance(error, InterpolationToMissingValueError) and error.full_key in ("hydra.run.dir", "hydra.sweep.dir"):
        experiments = ", ".join(sorted(path.stem for path in (config_dir / "experiment").glob("*.yaml")))
        if any(word.startswith("experiment=") for word in arguments):
            return "A sweep over experiments has no one name: say where it goes with hydra.sweep.dir=outputs/my_sweep"
        return (
            f"Choose an experiment, such as experiment=tms_5-2 (there are: {experiments}), or set name, target, data, "
            "pd.sites and steps."
        )
    if isinstance(error, OverrideParseException):
        return (
            f"Hydra cannot read {error.override}: quote what has special characters, as in 'key=\"a b\"'. "
            "A key with * or ? cannot be written on the command line at all: put it into a YAML file."
        )
    for plugin, (what, extra) in EXTRAS.items():
        if plugin in str(error):
            return f"{what} is not installed: pip install 'pdlightning[{extra}]'"
    if "does not support sweep type" in str(error):
        return "An interval has no end of values: give some (range(4), 1e-3,1e-2), or search in it with sweep=search."
    explained = explain_override_error(arguments, config_dir)
    return explained if explained is not None else str(error).strip()


def explain_override_error(overrides: Sequence[str], config_dir: Path, config_name: str = "config") -> str | None:
    """What is wrong with a command line that Hydra refused, or None where Hydra's own message says it all.

    Explained are an option that its group (a folder in `config_dir`) does not have, and a key that is not in the config
    composed from the chosen groups. Flags among `overrides` are passed over.
    """
    from hydra import compose, initialize_config_dir
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(config_dir.absolute()), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            for folder in own_config_dirs(overrides):
                if not folder.is_dir():
                    return f"--config-dir: there is no folder {folder}"
                loader.get_search_path().prepend("command-line", f"file://{folder}", anchor="schema")
            loader = ConfigLoaderImpl(loader.get_search_path())
            GlobalHydra.instance().hydra.config_loader = loader  # type: ignore[union-attr]
            choices, keys = [], []
            words = [word for word in overrides if word.startswith("~") or word.find("=") > 0 and word[0] != "-"]
            for override in OverridesParser.create().parse_overrides(words):
                if not (options := loader.get_group_options(group := override.key_or_group)):
                    if not override.is_add() and not override.is_hydra_override():
                        value = None if override.is_delete() else override.value()
                        keys += [(path, override.is_delete()) for path in _paths(group, value)]
                    continue
                sweep = override.is_sweep_override()
                chosen = list(override.sweep_string_iterator()) if sweep else override.value()
                chosen = chosen if isinstance(chosen, list) else [chosen]
                for option in chosen:
                    if isinstance(option, str) and option and option not in options:
                        near = suggest(option, options)
                        return f"{group}={option}: there is no such {group}{near} (available: {', '.join(options)})"
                choices.append(f"{override.get_key_element()}={chosen[0]}" if sweep else override.input_line)
            config = to_plain(compose(config_name, choices))
            groups = [group for group in loader.list_groups("") if group != "hydra"]
    except (HydraException, OmegaConfBaseException, ConfigError):
        return None
    return next((reason for key, gone in keys if (reason := _unknown_key(key, gone, config, groups))), None)


def own_config_dirs(arguments: Sequence[str]) -> list[Path]:
    """The folders that `--config-dir` adds to ours."""
    from hydra._internal.utils import get_args_parser

    folder = get_args_parser().parse_known_args(list(arguments))[0].config_dir
    return [] if folder is None else [Path(folder).absolute()]


def _paths(key: str, value: Any) -> list[list[str]]:
    """The keys that an override sets: its own, and those inside a `{...}`, which is merged into what is there."""
    parts = key.split(".")
    return [parts, *([*parts, str(inner)] for inner in (value if isinstance(value, dict) else ()))]


def _unknown_key(parts: Sequence[str], deleted: bool, config: dict[str, Any], groups: Sequence[str]) -> str | None:
    """Why the path is not in `config`; None if it is."""
    level: Any = config
    key = ".".join(parts)
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        if not isinstance(level, dict):
            return f"{key}: '{above}' is a value ({level!r}), not a group of settings"
        if part not in level:
            known = list(dict.fromkeys([*map(str, level), *(groups if depth == 0 else ())]))
            place = f"in '{above}'" if above else "at the top level"
            near = suggest(part, known)
            # A first key that nothing knows is a mistake; a later one may be an argument that the YAML leaves alone.
            add = f"; +{key}=... adds it" if depth and not near and not deleted else ""
            here = ", ".join(known) or "nothing"
            nothing = f", so ~{key} has nothing to delete" if deleted else ""
            return f"{key}: there is no '{part}' {place}{near} (there: {here}){add}{nothing}"
        level = level[part]
    return None
