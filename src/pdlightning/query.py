"""Words about runs: keys, which name a setting, label or metric by its end, and conditions. No code is run."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from pdlightning.catalogue import Run
from pdlightning.config import ConfigError, suggest
from pdlightning.naming import in_short

FIELDS = ("experiment", "name", "state", "why", "solved", "steps", "seconds", "folder")
CONDITION = re.compile(r"\s*([^<>=!~]+?)\s*(<=|>=|!=|==|=|<|>|~)\s*(.*?)\s*")
ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class Query:
    """What can be asked of some runs.

    A resolved key is a field, `labels.NAME`, `metrics.NAME` or `config.NAME`.
    """

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs

    @cached_property
    def swept(self) -> dict[str, str]:
        return {key: f"config.{key}" for run in self.runs for key in run.swept}

    @cached_property
    def named(self) -> dict[str, str]:
        """Labels and metrics by their names."""
        labels = {name: f"labels.{name}" for run in self.runs for name in run.labels}
        return {**{name: f"metrics.{name}" for run in self.runs for name in run.metrics}, **labels}

    @cached_property
    def settings(self) -> dict[str, str]:
        """Read only where they are asked for: every config is a file. What `pd` repeats from the top is left out."""
        keys = dict.fromkeys(key for run in self.runs for key in run.settings)
        return {key: f"config.{key}" for key in keys if not key.startswith(("pd.losses.", "pd.ci_fn."))}

    def resolve(self, key: str) -> str:
        """The full form of a key. What was swept comes before other settings of the same end.

        Raises:
            ConfigError: nothing is called so, or several things are.
        """
        if key in FIELDS:
            return key
        kind, _, rest = key.partition(".")
        exact: Callable[[], dict[str, str]]
        for exact in (lambda: self.swept, lambda: self.named, lambda: self.settings):
            full = set(exact().values())
            if key in exact():
                return exact()[key]
            if kind in ("labels", "metrics", "config") and key in full:
                return key
            if kind in ("labels", "metrics", "config"):
                ends = ending_in(rest, [name for name, to in exact().items() if to.startswith(f"{kind}.")])
            else:
                ends = ending_in(key, exact())
            if len(ends) == 1:
                return exact()[ends[0]]
            if ends:
                raise ConfigError(f"{key} may be {', '.join(ends)}: say more of it.")
        known = {**self.swept, **self.named, **self.settings}
        parts = {part for name in known for part in (name, name.rsplit(".", 1)[-1], name.rsplit("/", 1)[-1])}
        raise ConfigError(f"No run has '{key}'{suggest(key, [*FIELDS, *parts]) or '.'}")

    def value(self, run: Run, key: str) -> Any:
        """Of a resolved key, or of a swept setting or metric by its full name; None where the run has none."""
        if key in ("state", "why", "folder"):
            return str(getattr(run, key))
        if key in FIELDS:
            return run.said(key)
        kind, _, name = key.partition(".")
        if kind == "labels":
            return run.labels.get(name)
        if kind == "metrics":
            return run.metrics.get(name)
        name = name if kind == "config" else key
        return (
            run.metrics[name]
            if name in run.metrics
            else run.swept[name]
            if name in run.swept
            else run.settings.get(name)
        )

    def sorted(self, runs: Iterable[Run], key: str, *, reverse: bool) -> list[Run]:
        """Numbers in order, then words, then runs that have neither."""
        full = self.resolve(key)
        runs = list(runs)
        values = {id(run): self.value(run, full) for run in runs}

        def is_number(run: Run) -> bool:
            value = values[id(run)]
            return isinstance(value, int | float) and not math.isnan(value)

        numbers = sorted(filter(is_number, runs), key=lambda run: values[id(run)], reverse=reverse)
        words = sorted(
            (r for r in runs if isinstance(values[id(r)], str)), key=lambda r: values[id(r)], reverse=reverse
        )
        placed = {id(run) for run in [*numbers, *words]}
        return [*numbers, *words, *(run for run in runs if id(run) not in placed)]


def ending_in(key: str, names: Iterable[str]) -> list[str]:
    """`linear1/mmcs` and `mmcs` end `eval/match_linear1/mmcs`."""

    def ends(name: str) -> bool:
        before = (".", "/", "_") if "/" in name else (".",)
        return name.endswith(key) and name[: -len(key)].endswith(before)

    return [name for name in names if ends(name)]


def condition(text: str, query: Query) -> Callable[[Run], bool]:
    """`loss/total<1e-3` as a function of a run. A run without the key never meets it."""
    match = CONDITION.fullmatch(text)
    if match is None or not match[3]:
        raise ConfigError(f"--filter '{text}': expected KEY<VALUE, with one of < <= > >= = != ~ between them.")
    key, sign, wanted = query.resolve(match[1]), match[2], plain(match[3])
    if sign in ORDER and (wanted is None or isinstance(wanted, str | bool)):
        raise ConfigError(f"--filter '{text}': {sign} compares numbers, and {match[3]} is none.")

    def holds(run: Run) -> bool:
        value = query.value(run, key)
        if value is None:
            return wanted is None and sign in ("=", "==")
        if sign in ORDER:
            return isinstance(value, int | float) and ORDER[sign](value, wanted)
        if sign == "~":
            return match[3].lower() in in_short(value).lower()
        return same(value, wanted, match[3]) == (sign != "!=")

    return holds


def same(value: Any, wanted: Any, text: str) -> bool:
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    return value == wanted or str(value) == text or in_short(value) == text


def plain(text: str) -> Any:
    """A number, true, false or null, or the words themselves."""
    words = {"true": True, "false": False, "null": None, "yes": True, "no": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")
