"""What is built of a config that came from elsewhere: what we know by name, and nothing larger than its weights say.

`ALLOWED_PACKAGES` of config.py keeps mistakes out of one's own configs. A stranger's config may name anything in these
packages, among it functions that write files or load code. So its names are compared, as text and before anything is
imported for them, with those that a decomposition is made of.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pdlightning.config import ConfigError, join
from pdlightning.modules.ci import site_key
from pdlightning.modules.site import PRE_IDENTITY
from pdlightning.storage import StorageError

MODULES = (
    "pdlightning.data",
    "pdlightning.masking",
    "pdlightning.metrics",
    "pdlightning.metrics.figures",
    "pdlightning.modules",
    "pdlightning.optimization",
    "pdlightning.schedules",
    "pdlightning.targets",
    "pdlightning.targets.language",
)
"""Whose public classes a stranger's config may name."""

FURTHER = (
    "pdlightning.decomposition.ParameterDecomposition",
    "pdlightning.figures.targets.induction_figures",
    "pdlightning.figures.targets.resid_mlp_figures",
    "pdlightning.figures.targets.tms_figures",
    "pdlightning.targets.language.huggingface_model",
    "pdlightning.targets.last_position_cross_entropy",
    "torch.nn.functional.cross_entropy",
    "torch.nn.functional.l1_loss",
    "torch.nn.functional.mse_loss",
)
"""What else it may name."""

IMPORTS = ("class_path",)
"""Arguments that name something to import."""

Config = dict[str, Any]


def of_a_stranger(config: Config, *, allow: Iterable[str], origin: str) -> Config:
    """The config with what it says of this machine and of what may be built taken out, every name in it checked.

    Its own `allow` counts for nothing; `allow` are packages that the caller trusts. `cache_dir` and loggers are
    dropped: no file is written where a stranger says, and nobody is told.

    Raises:
        StorageError: it names something outside the list.
    """
    allow = list(allow)
    if not isinstance(config.get("logging"), Mapping):
        raise StorageError(f"{origin}: its config has no group 'logging'; it is not one of ours.")
    if problems := list(_strange_names(config, path="", allow=allow)):
        raise StorageError(
            f"{origin}: its config names what is not built for a stranger:\n  " + "\n  ".join(problems) + "\n"
            "Read that code. If you trust it, name its package: load_run(..., allow=['package'])"
        )
    return {**config, "allow": allow, "cache_dir": None, "logging": {**config["logging"], "loggers": {}}}


def _strange_names(node: Any, *, path: str, allow: list[str]) -> Iterator[str]:
    if isinstance(node, list):
        for i, value in enumerate(node):
            yield from _strange_names(value, path=join(path, i), allow=allow)
    elif isinstance(node, dict):
        for key, value in node.items():
            where = join(path, str(key))
            if where == "logging.loggers":
                continue
            strange = key == "_target_" and not known(value, allow)
            imports = key in IMPORTS and value is not None and not _within(value, ["transformers", *allow])
            if strange or imports:
                yield f"{where}: {value!r:.200}"
            yield from _strange_names(value, path=where, allow=allow)
    elif isinstance(node, str) and "${" in node:  # stored configs are resolved, and a resolver can make new nodes
        yield f"{path}: {node!r:.200}"


def known(target: Any, allow: Iterable[str]) -> bool:
    """Whether a `_target_` is in a package of `allow`, among `FURTHER`, or a public class of one of `MODULES`."""
    if not isinstance(target, str):
        return False
    if target in FURTHER or _within(target, allow):
        return True
    module, _, name = target.rpartition(".")
    if module not in MODULES:
        return False
    found = importlib.import_module(module)
    public = getattr(found, "__all__", None) or [n for n, x in vars(found).items() if _made_in(x, module)]
    return name in public and inspect.isclass(getattr(found, name))


def _within(name: Any, packages: Iterable[str]) -> bool:
    return isinstance(name, str) and any(name.startswith(f"{package}.") for package in packages)


def _made_in(value: Any, module: str) -> bool:
    return getattr(value, "__module__", None) == module


class Budget(TorchDispatchMode):
    """Inside, the tensors that are made have together no more numbers than those stored justify.

    A config of three lines can ask for terabytes.
    """

    TIMES, AT_LEAST = 16, 2**26

    def __init__(self, stored: Mapping[str, Tensor], origin: str):
        super().__init__()
        self.numbers = self.AT_LEAST + self.TIMES * sum(tensor.numel() for tensor in stored.values())
        self.made, self.origin = 0, origin

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], (list, tuple)) and all(isinstance(size, int) for size in args[0]):
            self.count(math.prod(args[0]))
            return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not any(isinstance(argument, Tensor) for argument in args):
            self.count(out.numel())
        return out

    def count(self, numbers: int) -> None:
        self.made += numbers
        if self.made > self.numbers:
            raise StorageError(
                f"{self.origin}: its config asks for a model far larger than the weights it comes with (more than "
                f"{self.numbers:,} numbers)."
            )


def refuse_other_sites(config: Config, sites: Mapping[str, Any], tensors: Mapping[str, Tensor], *, origin: str) -> None:
    """Sites as recorded, their C in the config, and the shapes of their V and U must be the same.

    Raises:
        StorageError: with the first site of which they are not.
    """
    if not isinstance(config["pd"].get("sites"), Mapping):
        raise ConfigError("pd.sites: expected a mapping of patterns to C.")
    for path, site in sites.items():
        if not isinstance(site, Mapping) or not {"d_in", "d_out", "C"} <= site.keys():
            raise StorageError(f"{origin}: site {path!r} is recorded without d_in, d_out or C.")
        shapes = {"V": [site["d_in"], site["C"]], "U": [site["C"], site["d_out"]]}
        for letter, shape in shapes.items():
            name = f"model.components.{site_key(path)}.{letter}"
            found = list(tensors[name].shape) if name in tensors else "absent"
            if found != shape:
                raise StorageError(f"{origin}: {letter} of site {path} is {found}, and should be {shape}.")
        chosen = [
            C
            for pattern, C in config["pd"]["sites"].items()
            if fnmatchcase(path, pattern) and path.endswith(PRE_IDENTITY) == pattern.endswith(PRE_IDENTITY)
        ]
        if chosen != [site["C"]]:
            raise StorageError(f"{origin}: site {path} has C {site['C']}, and its config says {chosen}.")
