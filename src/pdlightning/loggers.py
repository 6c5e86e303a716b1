"""The logger every run has: one CSV file, written aside and renamed, that survives a resume."""

from __future__ import annotations

import csv
import io
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from pdlightning.storage import atomic_write_text

SECONDS_BETWEEN_WRITES = 5.0


class MetricsCSV(Logger):
    """`metrics.csv`: one row per step, one column per name, blank where a name was not measured.

    Rows of an earlier part of the run are kept, up to `first_step`, from which the training goes on.
    """

    def __init__(self, *, path: Path, first_step: int = 0):
        super().__init__()
        self.path = path
        self.saved_at = 0.0
        self.rows: dict[int, dict[str, Any]] = {}
        if path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= first_step]
            self.rows = {int(row["step"]): {k: v for k, v in row.items() if v != ""} for row in kept}

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None:
            raise ValueError("MetricsCSV needs the step of the metrics.")
        self.rows.setdefault(step, {"step": step}).update({k: v for k, v in metrics.items() if k != "epoch"})
        self.save()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The config of a run stands in its config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """The file is written again when it is a few seconds old."""
        if time.monotonic() - self.saved_at > SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        self.saved_at = time.monotonic()
        names = dict.fromkeys(["step", *(name for row in self.rows.values() for name in row)])
        text = io.StringIO()
        writer = csv.DictWriter(text, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows[step] for step in sorted(self.rows))
        atomic_write_text(self.path, text.getvalue())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.write()
