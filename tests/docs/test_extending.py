"""The parts on the page of extensions, written to files, and the commands there and in the index of the losses."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from doc_pages import DOCS, blocks

from pdlightning.__main__ import main

TEXT = (DOCS / "extending.md").read_text()
TITLED = [(re.findall(r'title="([^"]+)"', fence), content) for fence, content in blocks(TEXT)]
FILES = {title[0]: content for title, content in TITLED if title and title[0] != "run"}
COMMANDS = [content.strip() for title, content in TITLED if title == ["run"]]
OF_LOSSES = [content.strip() for fence, content in blocks((DOCS / "losses" / "index.md").read_text()) if "run" in fence]
FAST = ["debug=fast", "steps=3", "metric=none", "~metric.slow.pgd_ladder", "hydra.run.dir=run"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with the files of the page."""
    for name, content in {**FILES, "my_package/__init__.py": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PDLIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    runpy.run_path(str(tmp_path / "save.py"))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def test_the_page_has_a_part_of_every_kind() -> None:
    kinds = ("losses", "ci", "target", "data")
    assert {f"my_package/{kind}.py" for kind in kinds} < FILES.keys() and len(COMMANDS) == 5 and len(OF_LOSSES) == 3
    for name in (f"my_package/{kind}.py" for kind in kinds):
        code = [line for line in FILES[name].splitlines() if line and not re.match(r"import|from| *\"\"\"", line)]
        assert len(code) <= 10, f"{name} is a ten-liner"


@pytest.mark.parametrize("command", [*COMMANDS, *OF_LOSSES])
def test_a_command_of_the_page_runs(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "pdlightning"]
    monkeypatch.setattr(sys, "argv", ["pdlightning", *words[3:], *FAST])
    main()
    logged = (folder / "run" / "metrics.csv").read_text().partition("\n")[0].split(",")
    config = (folder / "run" / "config.yaml").read_text()
    for word, trace in {
        "indecision": "my_package.losses.Indecision",
        "binomial_recon_half": "p: 0.5",
        "ci_fn=linear": "my_package.ci.LinearCI",
        "experiment=mine": "my_package.data.Blobs",
        "p.end=0.7": "end: 0.7",
        "form=relative": "form: relative",
        "pgd_recon": "pdlightning.masking.PGD",
        "smooth_l0": "pdlightning.metrics.SmoothL0Loss",
    }.items():
        assert word not in command or trace in config
    for loss in ("indecision", "binomial_recon_half"):
        assert loss not in command or {f"loss/{loss}", f"eval/loss/{loss}"} <= set(logged)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("conf", "experiment=min"), "experiment=min: there is no such experiment; did you mean 'mine'?"),
        (("conf", "experiment=mine", "stepz=3"), "there is no 'stepz' at the top level; did you mean 'steps'?"),
        (("conff", "experiment=mine"), "--config-dir: there is no folder"),
    ],
)
def test_a_mistake_beside_configs_of_yours_is_explained(
    words: tuple[str, ...], expected: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pdlightning", "--config-dir", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert expected in str(end.value.code)


def test_without_the_allow_list_a_class_of_yours_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = next(command for command in COMMANDS if "ci_fn=linear" in command)
    words = [word for word in shlex.split(command)[3:] if not word.startswith("allow=")]
    monkeypatch.setattr(sys, "argv", ["pdlightning", *words, *FAST])
    with pytest.raises(SystemExit) as end:
        main()
    assert "outside the allowed packages" in str(end.value.code) and "allow: [my_package]" in str(end.value.code)
