"""Plain YAML with `_target_` becomes objects; the schema is the constructor.

`validate` compares every `_target_` of a tree with the signature it will be called with, before anything is built;
`instantiate` validates, then builds. A node is `_target_: package.module.Name`, its keyword arguments, and optionally
`_partial_: true` (the result is a `functools.partial`).
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import inspect
import json
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

ALLOWED_PACKAGES = ("pdlightning", "torch", "lightning", "transformers", "datasets")
MISSING = "???"
Scalar = str | int | float | bool | None


class ConfigError(ValueError):
    """A config that cannot be built; the message has the config path, what was expected and what came."""


def suggest(name: str, candidates: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the candidate nearest to `name` (case aside), or `""` when none is near."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"; did you mean '{by_lower[near[0]]}'?" if near else ""


def join(path: str, key: str | int) -> str:
    """The config path of an entry: `loss` and `ci` give `loss.ci`, `callbacks` and 0 give `callbacks[0]`."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key


def to_plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as plain dicts and lists, every `${...}` resolved; objects inside are kept as they are."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if not isinstance(config, DictConfig):
            config = OmegaConf.create(dict(config), flags={"allow_objects": True})
        return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from error


def flatten(config: Mapping[str, Any]) -> dict[str, Scalar]:
    """Dotted key -> scalar, for loggers. A list is one value (its JSON), as it is on the command line."""
    flat: dict[str, Scalar] = {}

    def walk(node: Mapping[str, Any], path: str) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                walk(value, join(path, str(key)))
            else:
                flat[join(path, str(key))] = json.dumps(value) if isinstance(value, (list, tuple)) else value

    walk(to_plain(config), "")
    return flat


def config_hash(config: Mapping[str, Any]) -> str:
    """Twelve hex digits of the sha256 of the resolved config's canonical JSON; the order of keys does not matter."""
    canonical = json.dumps(to_plain(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def validate(config: Mapping[str, Any], *, allow: Iterable[str] = (), path: str = "") -> None:
    """Raise a `ConfigError` that lists everything in the tree that could not be built; build nothing.

    Checked: no value is `???`; every `_target_` is in an allowed package and imports; its arguments have the names, and
    where they are annotated with scalars, Literals or containers of these the types, that its signature asks for.
    `allow` adds packages to `ALLOWED_PACKAGES`; `path` is where `config` stands in the whole config. The allow-list
    stops a config from naming `os.system`; it does not make a stranger's config safe to build.
    """
    if problems := list(_problems(to_plain(config), path=path, allowed=(*ALLOWED_PACKAGES, *allow))):
        raise ConfigError("\n".join(problems))


def instantiate(config: Mapping[str, Any], *, allow: Iterable[str] = (), path: str = "") -> Any:
    """Validate, then build the tree from its leaves up. Nodes without `_target_` come out as plain dicts and lists.

    An exception of a constructor passes through, with a note saying which config path was being built.
    """
    validate(config, allow=allow, path=path)
    return _build(to_plain(config), path=path, allowed=(*ALLOWED_PACKAGES, *allow))


def _build(node: Any, *, path: str, allowed: Sequence[str]) -> Any:
    if isinstance(node, list):
        return [_build(value, path=join(path, i), allowed=allowed) for i, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    built = {key: _build(value, path=join(path, str(key)), allowed=allowed) for key, value in node.items()}
    if "_target_" not in built:
        return built
    target = _locate(built.pop("_target_"), path=path, allowed=allowed)
    if built.pop("_partial_", False):
        return functools.partial(target, **built)
    try:
        return target(**built)
    except Exception as error:
        error.add_note(f"while building the config's {path or 'top level'} ({node['_target_']})")
        raise


def _locate(target: Any, *, path: str, allowed: Sequence[str]) -> Callable[..., Any]:
    """Import the dotted path `target`; a `ConfigError` names `path` and the nearest name that does exist."""
    where = join(path, "_target_")
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError(f"{where}: expected a dotted path such as 'torch.nn.Linear', got {target!r}")
    package, *names = target.split(".")
    remedy = f"allowed: {', '.join(allowed)}. Add your own with allow: [{package}]"
    if package not in allowed:
        raise ConfigError(f"{where}: '{target}' is outside the allowed packages{suggest(package, allowed)} ({remedy})")
    found, so_far = _import(package, where), package
    for name in names:
        submodules = [module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))]
        if not hasattr(found, name) and name in submodules:
            _import(f"{so_far}.{name}", where)
        if not hasattr(found, name):
            near = suggest(name, [*dir(found), *submodules])
            raise ConfigError(f"{where}: '{target}' does not exist: '{so_far}' has no '{name}'{near}")
        found, so_far = getattr(found, name), f"{so_far}.{name}"
    if not callable(found):
        raise ConfigError(f"{where}: '{target}' is a {type(found).__name__}; expected a class or a function")
    # A module's own imports are attributes too: torch.os.system is not torch's.
    home = (getattr(found, "__module__", None) or package).partition(".")[0]
    if home not in allowed:
        raise ConfigError(f"{where}: '{target}' belongs to '{home}', outside the allowed packages ({remedy})")
    return found


def _import(module: str, where: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{where}: importing '{module}' failed: {error}") from error


def _problems(node: Any, *, path: str, allowed: Sequence[str]) -> Iterator[str]:
    """One sentence for each thing in the tree that would fail to build."""
    if isinstance(node, str) and node == MISSING:
        yield f"{path}: a value is required; give it as {path}=... on the command line or write it in the YAML"
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _problems(value, path=join(path, i), allowed=allowed)
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _problems(value, path=join(path, str(key)), allowed=allowed)
        special = {str(key) for key in node if str(key).startswith("_") and str(key).endswith("_")}
        for key in sorted(special - {"_target_", "_partial_"}):
            yield f"{join(path, key)}: unknown keyword; only _target_ and _partial_ have a meaning"
        if node.get("_target_", MISSING) != MISSING:
            yield from _binding_problems(node, path=path, allowed=allowed)
        elif "_partial_" in node:
            yield f"{join(path, '_partial_')}: only a node with _target_ can be partial"


def _binding_problems(node: dict[str, Any], *, path: str, allowed: Sequence[str]) -> Iterator[str]:
    """What keeps the node's arguments from being bound to its target's signature."""
    try:
        target = _locate(node["_target_"], path=path, allowed=allowed)
    except ConfigError as error:
        yield str(error)
        return
    partial = node.get("_partial_", False)
    if not isinstance(partial, bool):
        yield f"{join(path, '_partial_')}: expected true or false, got {partial!r}"
    try:
        parameters = inspect.signature(target).parameters
        handed_on = _handed_on(target)
    except ValueError:  # callables written in C may have no readable signature; they check their own call
        return
    arguments = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}
    for key, value in arguments.items():
        where = join(path, str(key))
        if key in named:
            yield from _type_problems(value, _annotation(named[key], value, target), path=where)
        elif handed_on is not None and key not in handed_on:
            known = [*named, *handed_on]
            near = f"{suggest(str(key), known)} (it takes: {', '.join(known) or 'no arguments'})"
            yield f"{where}: {node['_target_']} has no argument '{key}'{near}"
    for name, parameter in named.items():
        if not partial and name not in arguments and parameter.default is inspect.Parameter.empty:
            yield f"{join(path, name)}: {node['_target_']} requires the argument '{name}', which is missing"


def _handed_on(target: Any) -> list[str] | None:
    """The names that the `**arguments` of a target may have; None where that is any name.

    Those of a class go to its bases, as far as ours go: torchmetrics takes settings of its own there, which no config
    needs.
    """
    names: dict[str, None] = {}
    parameters = inspect.signature(target).parameters.values()
    for base in target.__mro__[1:] if isinstance(target, type) else ():
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
        if base.__module__.startswith("torchmetrics."):
            return list(names)
        if "__init__" in vars(base):
            parameters = inspect.signature(base).parameters.values()
            names |= {p.name: None for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return None if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters) else list(names)


def _annotation(parameter: inspect.Parameter, value: Any, target: Callable[..., Any]) -> Any:
    """What `value` must fit: `Any` where nothing is known, and for the default (libraries write `x: int = None`)."""
    if parameter.annotation is inspect.Parameter.empty or value is parameter.default:
        return Any
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    try:
        function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
        return eval(parameter.annotation, function.__globals__)
    except (NameError, AttributeError, TypeError):  # a name imported for type checkers only
        return Any


def _type_problems(value: Any, expected: Any, *, path: str) -> Iterator[str]:
    """Scalars, Literals, unions and containers of these; whatever YAML cannot write is left to the constructor."""
    origin, options = typing.get_origin(expected), typing.get_args(expected)
    if (isinstance(value, str) and value == MISSING) or (isinstance(value, dict) and "_target_" in value):
        return
    if origin in (typing.Union, types.UnionType):
        reasons = [list(_type_problems(value, option, path=path)) for option in options]
        if all(reasons):
            near = [reason[0] for reason in reasons if "did you mean" in reason[0]]
            yield near[0] if near else f"{path}: expected {inspect.formatannotation(expected)}, got {value!r}"
    elif origin is Literal:
        if not any(type(value) is type(option) and value == option for option in options):
            near = suggest(value, [o for o in options if isinstance(o, str)]) if isinstance(value, str) else ""
            yield f"{path}: expected one of {', '.join(map(repr, options))}, got {value!r}{near}"
    elif origin in (list, Sequence) and isinstance(value, list):
        for i, item in enumerate(value):
            yield from _type_problems(item, options[0], path=join(path, i))
    elif origin in (dict, Mapping) and isinstance(value, dict):
        for key, item in value.items():
            yield from _type_problems(item, options[1], path=join(path, str(key)))
    elif not _fits(value, origin or expected):
        yield f"{path}: expected {inspect.formatannotation(expected)}, got {value!r}"


def _fits(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if kind in (list, tuple, Sequence):
        return isinstance(value, list)
    if kind in (str, bool, dict, Mapping, types.NoneType):
        return isinstance(value, kind)
    if isinstance(value, Scalar) and inspect.isclass(kind) and kind is not Path:
        return kind is Any or getattr(kind, "_is_protocol", False) or isinstance(value, kind)
    return True
