"""Heat maps of a report: the single-feature probe, V and U, as float16 in base64."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdlightning.report.read import RunFiles

VALUES = 400_000
"""Of all heat maps of one kind together; beyond that the last columns are left out, those that matter least."""

HeatMap = dict[str, Any]
ORDERS = {
    "identity": "in the order that matches them to the features",
    "dense": "by mass",
    "none": "in their own order",
}


def probe_maps(run: RunFiles) -> list[HeatMap]:
    """ci of single-feature inputs, one map for each panel of the figure."""
    if "probe" not in run.data:
        return []
    panels = run.data["probe"]["panels"]
    room = room_of_each(sum(len(panel["ci"]) * len(panel["columns"]) for panel in panels.values()), len(panels))
    return [
        heat_map(
            id=f"probe-{i}",
            title=name,
            values=np.array(panel["ci"], dtype=np.float32),
            rows="feature",
            columns=names_of_columns(panel["sites"], panel["columns"]),
            what=f"ci; subcomponents {ORDERS[panel['order']]}",
            colours="ci",
            limit=1.0,
            room=room,
        )
        for i, (name, panel) in enumerate(panels.items())
    ]


def names_of_columns(sites: Mapping[str, int], columns: Sequence[int]) -> list[str]:
    """The number of each subcomponent, with its site where several sites stand side by side."""
    if len(sites) == 1:
        return [f"{c}" for c in columns]
    names = [f"{site} {c}" for site, C in sites.items() for c in range(C)]
    return [names[c] for c in columns]


def weight_maps(run: RunFiles) -> list[HeatMap]:
    """V and U transposed of every site, one column for each subcomponent, in matched order."""
    tensors = run.folder / "decomposition" / "tensors.safetensors"
    if "weights" not in run.data or not tensors.is_file():
        return []
    from safetensors import safe_open

    from pdlightning.modules.ci import site_key

    order: Mapping[str, list[int]] = run.data["weights"]["order"]
    maps = []
    with safe_open(tensors, framework="np") as file:
        sizes = [file.get_slice(f"model.components.{site_key(s)}.{w}").get_shape() for s in order for w in "VU"]
        room = room_of_each(sum(a * b for a, b in sizes), len(sizes))
        for i, (site, columns) in enumerate(order.items()):
            key = f"model.components.{site_key(site)}"
            V, U = file.get_tensor(f"{key}.V"), file.get_tensor(f"{key}.U").T
            for name, values, rows in (("V", V, "input"), ("U", U, "output")):
                maps.append(
                    heat_map(
                        id=f"weights-{i}-{name}",
                        title=f"{name} of {site}",
                        values=values[:, columns].astype(np.float32),
                        rows=rows,
                        columns=[f"{c}" for c in columns],
                        what="weight",
                        colours="weight",
                        limit=float(np.abs(values).max()) or 1.0,
                        room=room,
                    )
                )
    return maps


def room_of_each(total: int, n: int) -> int:
    """How many values a map may have: all of them, or an equal part where all maps together have too many."""
    return total if total <= VALUES else VALUES // n


def heat_map(
    *,
    id: str,
    title: str,
    values: NDArray[np.float32],
    rows: str,
    columns: Sequence[str],
    what: str,
    colours: str,
    limit: float,
    room: int,
) -> HeatMap:
    """`values` `[rows, columns]`, cut to the first columns that fit into `room` values."""
    n = min(values.shape[1], max(room // values.shape[0], 1))
    left_out = values.shape[1] - n
    return {
        "id": id,
        "title": title,
        "rows": rows,
        "n_rows": values.shape[0],
        "columns": list(columns[:n]),
        "what": what,
        "colours": colours,
        "limit": limit,
        "left_out": left_out,
        "values": base64.b64encode(values[:, :n].astype("<f2").tobytes()).decode(),
    }
