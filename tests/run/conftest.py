from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from pdlightning.__main__ import CONF
from pdlightning.config import to_plain
from pdlightning.run import run

Config = dict[str, Any]
TINY = (
    "experiment=tms_5-2",
    "debug=fast",
    "pd.sites.linear1=6",
    "pd.sites.linear2=6",
    "data.batch_size=8",
    "runtime.threads=1",
    "runtime.keep_memory=false",
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def composed(cache: Path) -> Callable[..., Config]:
    """The resolved config of a command line."""

    def make(*words: str) -> Config:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = to_plain(compose("config", [*words, f"cache_dir={cache}"]))
        del config["resume"]
        return config

    return make


@pytest.fixture(scope="session")
def tiny(composed: Callable[..., Config]) -> Callable[..., Config]:
    """A run of six steps, or as changed, without figures: they take most of the time of a small run."""

    def make(*words: str) -> Config:
        config = composed(*TINY, *words)
        slow = config["metric"]["slow"]
        config["metric"]["slow"] = {k: v for k, v in slow.items() if ".figures." not in v["_target_"]}
        return config

    return make


@pytest.fixture(scope="session")
def finished(composed: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended, figures and TensorBoard included. Look, and copy it to change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(composed(*TINY, "logging=tensorboard", "debug=fast"), folder)
    return folder


def tensors_of(folder: Path) -> bytes:
    return (folder / "decomposition" / "tensors.safetensors").read_bytes()


def rows_of(folder: Path) -> dict[int, dict[str, str]]:
    """step -> what metrics.csv says of it, without the blanks."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): {k: v for k, v in row.items() if v and k != "step"} for row in csv.DictReader(file)}


def without_speed(folder: Path) -> dict[int, dict[str, str]]:
    """What metrics.csv says, but for the times that steps took."""
    rows = rows_of(folder)
    return {step: {k: v for k, v in row.items() if not k.startswith("throughput/")} for step, row in rows.items()}


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())
