"""Reads a Weights & Biases run directory back, from the file that `wandb sync` would send."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32 * 1024, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class StoredRun:
    id: str = ""
    name: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    axes: dict[str, str] = field(default_factory=dict)
    exit_code: int | None = None


def records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: blocks of 32 KiB, in each chunks of (crc, length, type) and their bytes."""
    assert content[:4] == b":W&B"
    at, parts = HEADER, []
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + HEADER : at + HEADER + length])
        at += HEADER + length
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []


def read(folder: Path) -> StoredRun:
    from wandb.proto import wandb_internal_pb2 as proto

    (path,) = folder.glob("run-*.wandb")
    run = StoredRun()
    for content in records(path.read_bytes()):
        record: Any = proto.Record()
        record.ParseFromString(content)
        match record.WhichOneof("record_type"):
            case "run":
                run.id, run.name, run.group = record.run.run_id, record.run.display_name, record.run.run_group
                run.tags = list(record.run.tags)
                run.settings |= values(record.run.config.update)
            case "history":
                run.history.append(values(record.history.item))
            case "summary":
                run.summary |= values(record.summary.update)
            case "files":
                run.files |= {entry.path for entry in record.files.files}
            case "metric":
                run.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
