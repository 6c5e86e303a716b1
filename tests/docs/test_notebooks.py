"""The notebooks run from the first cell to the last, and are stored with what they printed and drew."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from doc_pages import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TMS, PROJECT = (next(path for path in NOTEBOOKS if path.name.startswith(n)) for n in ("1_", "2_"))


def executed(path: Path, folder: Path, *, asked: str = "None") -> tuple[Any, str]:
    """The notebook after a run in an empty folder, and the value of an expression in it."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"print({asked})"))
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, kernel_name="python3", timeout=900, resources=where).execute()
    return notebook, notebook.cells.pop().outputs[0]["text"].strip()


def outputs(notebook: Any) -> Iterator[Any]:
    return (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)


def figures(notebook: Any) -> list[str]:
    return [output["data"]["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_with_few_steps(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDLIGHTNING_NOTEBOOK_STEPS", "10")
    notebook, steps = executed(path, tmp_path, asked="STEPS")
    assert steps == "10" and len(figures(notebook)) == len(figures(nbformat.read(path, as_version=4)))
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [
        output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert figures(notebook) and all(len(figure) < 150_000 for figure in figures(notebook))
    assert not re.search(r"/(?:home|Users|root|tmp|opt|work|usr)/", path.read_text()), "a path of some machine"


def test_the_stored_toy_has_found_five_mechanisms() -> None:
    text = "".join(output.get("text", "") for output in outputs(nbformat.read(TMS, as_version=4)))
    assert len(re.findall(r"'identity error': 0, 'recovered': '5 of 5'", text)) == 2
    assert "bit for bit: True" in PROJECT.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_toy_finds_its_five_mechanisms(tmp_path: Path) -> None:
    _, found = executed(
        TMS, tmp_path, asked="[(f['identity error'], f['recovered'], f['MMCS'] > 0.99) for f in found.values()]"
    )
    assert found == "[(0, '5 of 5', True), (0, '5 of 5', True)]"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_project_comes_back_from_its_checkpoint_and_keeps_its_output(tmp_path: Path) -> None:
    _, found = executed(PROJECT, tmp_path, asked="same, error / scale < 0.1, needed['0'] <= 16")
    assert found == "True True True"
