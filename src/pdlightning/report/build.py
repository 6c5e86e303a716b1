"""The page of a run or a sweep: what was read, arranged, and written as one HTML file."""

from __future__ import annotations

import os
import traceback
import warnings
from pathlib import Path

from pdlightning.report.curves import curve_charts
from pdlightning.report.matrices import probe_maps, weight_maps
from pdlightning.report.page import render
from pdlightning.report.pictures import pictures
from pdlightning.report.read import RunFiles, is_run, read_run
from pdlightning.report.sweep import sweep_page
from pdlightning.report.tables import (
    goals,
    masking_tables,
    metric_table,
    settings,
    site_table,
    spectrum_charts,
)
from pdlightning.report.words import commit, facts, missing, origin, tiles, verdict
from pdlightning.sharing.reproduce import command_of
from pdlightning.storage import StorageError, atomic_write_text

REPORT = "report.html"


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run or sweep folder to `out`, by default `report.html` inside it; returns where it is.

    Raises:
        StorageError: the folder is neither; the message says what was looked for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StorageError(f"{folder.absolute()} is not a folder: expected that of a run or of a sweep.")
    out = folder / REPORT if out is None else Path(out)
    page = run_page(read_run(folder), out=out) if is_run(folder) else sweep_page(folder, out=out)
    atomic_write_text(out, page)
    return out


def report_afterwards(folder: Path) -> None:
    """`write_report` at the end of a run or sweep: whatever goes wrong is a warning, for they are worth more."""
    try:
        write_report(folder)
    except Exception:
        warnings.warn(f"The report of {folder} failed and is skipped.\n{traceback.format_exc()}", stacklevel=2)


def run_page(run: RunFiles, *, out: Path) -> str:
    metrics = run.metrics
    curves, spectra = curve_charts(run.rows, run.config), spectrum_charts(run)
    probes, weights = probe_maps(run), weight_maps(run)
    shown = pictures(run)
    examples = run.data.get("examples")
    payload = {"charts": [*curves, *spectra], "maps": [*probes, *weights], "examples": examples}
    return render(
        "run.html.jinja",
        payload=payload,
        run=run,
        title=f"{run.config['name']}, seed {run.config['seed']}",
        verdict=verdict(run),
        facts=facts(run),
        tiles=tiles(run),
        goals=goals(run.config, metrics),
        notes=[*missing(run, curves), *run.notes],
        curves=[c for c in curves if not c["late"]],
        late_curves=[c for c in curves if c["late"]],
        spectra=spectra,
        sites=site_table(run),
        sites_step=run.data["sites"]["step"] if "sites" in run.data else None,
        positions=run.data["sites"]["positions"] if "sites" in run.data else None,
        probes=probes,
        weights=weights,
        pictures=shown,
        maskings=masking_tables(run),
        examples=examples,
        pages=[relative(page, out.parent) for page in run.pages],
        metrics=metric_table(run),
        settings=settings(run.config),
        commit=commit(run),
        command=command_of(run.config),
        origin=origin(run),
    )


def relative(path: Path, start: Path) -> str:
    """For a link: from the folder of the page, with slashes."""
    return Path(os.path.relpath(path.absolute(), start.absolute())).as_posix()
