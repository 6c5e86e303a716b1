"""Groups of sites for ci functions that have several networks: by pattern, or as consecutive blocks of the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from pdlightning.modules.site import PRE_IDENTITY

Groups = int | Mapping[str, list[str]]


def check_groups(groups: Groups, *, name: str) -> Groups:
    """What can be said of `groups` before the sites are known; a ValueError names the ci function `name`."""
    if isinstance(groups, Mapping):
        if not groups:
            raise ValueError(f"{name}: groups is empty; expected a number, or group -> patterns of its sites.")
        for group, patterns in groups.items():
            check_patterns(patterns, name=f"{name}: groups[{group!r}]")
    elif isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{name}: groups must be a number >= 1, or group -> patterns of its sites, got {groups!r}.")
    return groups


def check_patterns(patterns: list[str], *, name: str) -> None:
    if isinstance(patterns, str) or not patterns:
        raise ValueError(f"{name}: expected a list of at least one pattern, got {patterns!r}.")


def matching(sites: Sequence[str], patterns: Sequence[str], *, name: str) -> list[str]:
    """The sites that one of the fnmatch patterns matches, in the order of `sites`."""
    for pattern in patterns:
        if not any(fnmatchcase(site, pattern) for site in sites):
            raise ValueError(f"{name}: pattern {pattern!r} matches no site. The sites: {', '.join(sites)}.")
    return [site for site in sites if any(fnmatchcase(site, pattern) for pattern in patterns)]


def site_groups(sites: Sequence[str], groups: Groups, *, name: str) -> dict[str, list[str]]:
    """Group -> its sites, in the order of `sites`; the groups are in the order of their first site.

    A number n gives the groups `group_0` .. `group_<n-1>` of consecutive blocks (`block_of`), as even as they can be,
    the longer ones first.

    Raises:
        ValueError: a pattern that matches nothing, a site in two groups or in none, or more groups than blocks.
    """
    if isinstance(groups, int):
        return _consecutive(sites, groups, name=name)
    found = {group: matching(sites, p, name=f"{name}: groups[{group!r}]") for group, p in groups.items()}
    for site in sites:
        having = [group for group, members in found.items() if site in members]
        if len(having) != 1:
            where = f"in the groups {having}: make their patterns disjoint" if having else "in no group: add a pattern"
            raise ValueError(f"{name}: site {site!r} is {where}.")
    return dict(sorted(found.items(), key=lambda item: sites.index(item[1][0])))


def _consecutive(sites: Sequence[str], n: int, *, name: str) -> dict[str, list[str]]:
    blocks: dict[str, list[str]] = {}
    for site in sites:
        blocks.setdefault(block_of(site), []).append(site)
    if n > len(blocks):
        raise ValueError(f"{name}: {n} groups of {len(blocks)} blocks ({', '.join(blocks)}): ask for fewer.")
    members, size, longer = list(blocks.values()), len(blocks) // n, len(blocks) % n
    starts = [i * size + min(i, longer) for i in range(n + 1)]
    return {f"group_{i}": sum(members[starts[i] : starts[i + 1]], []) for i in range(n)}


def block_of(site: str) -> str:
    """`h.3.mlp.c_fc` -> `h.3`: a path up to its first number. A path without a number is a block of its own."""
    parts = site.removesuffix(PRE_IDENTITY).split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts)
