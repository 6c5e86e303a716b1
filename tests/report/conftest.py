from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_folders import config_of, write_run

RATES = (0.0012520653814999472, 0.0007035737028722148, 0.008459126528049376, 0.008459311111111111)


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """Over learning rates, of which two differ in the fifth digit. Its jobs end almost alike; job 2 is the best."""
    folder = tmp_path / "search"
    for i, rate in enumerate(RATES):
        swept = {"pd.components_optimizer.lr.start": rate, "ci_fn": f"a_long_name_of_ci_function_{i % 2}"}
        write_run(folder / f"{i}_lr", config_of(logging={"swept": swept}), scale=1 + 1e-5 * i)
    best = 1e-9 * (1 + 1e-5 * 2)
    (folder / "optimization_results.yaml").write_text(yaml.safe_dump({"name": "optuna", "best_value": best}))
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A real Chromium; a test that wants it is skipped, with the reason, where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
    where = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if where is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as running:
        # Its sandbox cannot start where the tests run as root, as in a container; the page is our own.
        chromium = running.chromium.launch(executable_path=where, args=["--no-sandbox"])
        yield chromium
        chromium.close()
