"""Finding the sites of a target by pattern (spec C7) and putting them in place (design decision 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from pdlightning.modules.passes import CurrentPass
from pdlightning.modules.site import (
    PRE_IDENTITY,
    SUPPORTED,
    Block,
    Components,
    PreIdentity,
    Site,
    SiteKind,
    StandIn,
    site_kind,
)
from pdlightning.modules.site_groups import block_of


@dataclass(frozen=True)
class SiteSpec:
    """One match: the path of the site, the module it concerns, its kind, and C."""

    path: str
    kind: SiteKind
    C: int
    width: int = 0

    @property
    def module_path(self) -> str:
        return self.path.removesuffix(PRE_IDENTITY) if self.kind == "identity" else self.path


def find_sites(target: nn.Module, sites: Mapping[str, int]) -> list[SiteSpec]:
    """The sites that the patterns name, in the order of the target's modules (spec C7).

    Raises:
        ValueError: no pattern at all, C < 1, a pattern that matches nothing (the candidates are listed), a module
            matched by two patterns, or two paths to one place.
        TypeError: a pattern names a module that cannot be decomposed.
    """
    if not sites:
        raise ValueError("No sites to decompose: pass sites={pattern: C}, such as {'layers.*.mlp_in': 100}.")
    modules = {path: m for path, m in target.named_modules(remove_duplicate=False) if path}
    found: dict[str, tuple[str, SiteSpec]] = {}
    for pattern, C in sites.items():
        if isinstance(C, bool) or not isinstance(C, int) or C < 1:
            raise ValueError(f"sites[{pattern!r}]: C, the number of subcomponents, must be an integer >= 1, got {C!r}.")
        for spec in _matches(modules, pattern, C):
            if spec.path in found:
                raise ValueError(
                    f"Site {spec.path!r} is matched by two patterns, {found[spec.path][0]!r} and"
                    f" {pattern!r}: make them disjoint."
                )
            found[spec.path] = (pattern, spec)
    order = {path: i for i, path in enumerate(modules)}
    specs = sorted((s for _, s in found.values()), key=lambda s: (order[s.module_path], s.kind != "identity"))
    _check_places(target, specs)
    return specs


def _check_places(target: nn.Module, specs: list[SiteSpec]) -> None:
    """Two paths through one shared module lead to one place, where only one site can stand."""
    taken: dict[tuple[int, str, bool], str] = {}
    for spec in specs:
        parent, _, name = spec.module_path.rpartition(".")
        place = (id(target.get_submodule(parent)), name, spec.kind == "identity")
        if place in taken:
            raise ValueError(
                f"Sites {taken[place]!r} and {spec.path!r} are one place: the module {parent!r} that holds it is used"
                " twice. Give each use a module of its own (the weights may stay shared) to decompose them."
            )
        taken[place] = spec.path


def _matches(modules: dict[str, nn.Module], pattern: str, C: int) -> list[SiteSpec]:
    if pattern.endswith(PRE_IDENTITY):
        paths = [path for path in modules if fnmatchcase(path, pattern.removesuffix(PRE_IDENTITY))]
        specs = [SiteSpec(path + PRE_IDENTITY, "identity", C, _input_width(path, modules[path])) for path in paths]
    else:
        paths = [path for path in modules if fnmatchcase(path, pattern)]
        kinds: dict[str, SiteKind | None] = {path: site_kind(modules[path]) for path in paths}
        specs = [SiteSpec(path, kind, C) for path, kind in kinds.items() if kind]
        for path, kind in kinds.items():
            # Containers and activations that a wildcard sweeps up beside the rest are no mistake: they hold no weight.
            if kind is None and (not specs or any(True for _ in modules[path].parameters(recurse=False))):
                raise TypeError(
                    f"Pattern {pattern!r} matches {path!r}, a {type(modules[path]).__name__}, which cannot be"
                    f" decomposed. The kinds that work: {SUPPORTED}."
                )
    if not specs:
        candidates = [path for path, module in modules.items() if site_kind(module) is not None]
        raise ValueError(
            f"Pattern {pattern!r} matches no module. The modules that can be decomposed: {', '.join(candidates)}."
        )
    return specs


def _input_width(path: str, module: nn.Module) -> int:
    """The width of what enters a module: that of the first matrix in it."""
    for inner in module.modules():
        match site_kind(inner):
            case "linear":
                return inner.in_features  # type: ignore[return-value]
            case "conv1d":
                return inner.weight.shape[0]  # type: ignore[union-attr, index]
    raise TypeError(
        f"Cannot put an identity in front of {path!r}, a {type(module).__name__}: no nn.Linear or Conv1D"
        " in it tells the width of its input."
    )


def install(target: nn.Module, spec: SiteSpec, current: CurrentPass, *, seed: int) -> Components:
    """Replace the module at the spec's path by its site; returns the site's components.

    Inner modules come before what holds them, and a site before the identity in front of it, so that paths stay valid.
    """
    module = target.get_submodule(spec.module_path)
    components = Components(path=spec.path, kind=spec.kind, module=module, C=spec.C, seed=seed, width=spec.width)
    site = Site(module=nn.Identity() if spec.kind == "identity" else module, components=components, current=current)
    new = PreIdentity(site=site, module=module) if spec.kind == "identity" else site
    target.set_submodule(spec.module_path, new)
    return components


def install_blocks(target: nn.Module, sites: list[str], current: CurrentPass) -> None:
    """Put a stand-in around every block of the target (`block_of`) that holds some of the sites."""
    blocks: dict[str, list[str]] = {}
    for site in sites:
        blocks.setdefault(block_of(site), []).append(site)
    for path, members in blocks.items():
        if path not in members:
            parent, _, name = path.rpartition(".")
            holder = target.get_submodule(parent)
            while isinstance(holder, StandIn):  # a block in a block: its place is in the module behind
                holder = holder.module
            module = getattr(holder, name)
            setattr(holder, name, Block(path=path, module=module, sites=members, current=current))


def uninstall(target: nn.Module) -> None:
    """Put every module back in the place its site stood in, from the innermost outwards."""
    for path, module in reversed(list(target.named_modules(remove_duplicate=False))):
        if isinstance(module, PreIdentity | Site | Block):
            target.set_submodule(path, module.module)
