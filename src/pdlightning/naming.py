"""How a run is called: by what was swept and how its user labels it, in few letters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

SAY_NOTHING = ("start", "end", "kind", "warmup_frac", "final_frac", "_target_")
"""Last parts of a key that are told with the one before: `coeff.start`."""
LONGEST = 120
"""Letters in the name of a job's folder; file systems take 255 bytes."""


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Dotted key -> its last parts, as many as tell it from the other keys."""
    parts = {key: key.split(".") for key in keys}

    def shortest(key: str) -> str:
        own = parts[key]
        for n in range(2 if own[-1] in SAY_NOTHING else 1, len(own) + 1):
            if not any(other[-n:] == own[-n:] for name, other in parts.items() if name != key):
                return ".".join(own[-n:])
        return key

    return {key: shortest(key) for key in parts}


def in_short(value: Any) -> str:
    """A value as in a name: four digits that matter, `1e-5`, `true`, `null`."""
    if isinstance(value, float):
        return re.sub(r"e([+-])0+", r"e\1", f"{value:.4g}").replace("e+", "e")
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def pairs(values: Mapping[str, Any]) -> list[str]:
    """`{"loss.importance_minimality.coeff": 1e-3, "seed": 3}` -> `["coeff=0.001", "seed=3"]`."""
    short = short_keys(values)
    return [f"{short[key]}={in_short(value)}" for key, value in values.items()]


def run_name(swept: Mapping[str, Any]) -> str:
    """`seed=3,coeff=0.001`."""
    return ",".join(pairs(swept))


def folder_name(number: int, swept: Mapping[str, Any]) -> str:
    """`7_seed=3_coeff=0.001`: sorts by number, and needs no quotes, neither in a shell nor for Hydra."""
    words = re.sub(r"[^\w.=+-]+", "-", "_".join([str(number), *pairs(swept)]))
    return words[:LONGEST].rstrip("-._")


def named(config: Mapping[str, Any]) -> dict[str, Any]:
    """`name`, `tags`, `labels` and `swept` of a run, as in its summary.json and in loggers."""
    logging, labels = config["logging"], config["labels"] or {}
    tags = [
        *logging["tags"],
        *pairs(logging["swept"]),
        *(f"{name}={in_short(value)}" for name, value in labels.items()),
    ]
    return {
        "name": logging["run_name"] or config["name"],
        "tags": list(dict.fromkeys(tags)),
        "labels": labels,
        "swept": logging["swept"],
    }
