"""A finished run to share, a cache of its own for every test, and servers on loopback."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run.conftest import cache, composed, tiny  # noqa: F401 (fixtures)
from sharing.servers import Hub, running

from pdlightning.run import run


@pytest.fixture(scope="session")
def shared(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The folder of a run that has ended. Look, and copy it to change it."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    config = tiny()
    config["metric"]["slow"] = {}
    run(config, folder)
    return folder


@pytest.fixture
def copied(shared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache, key or server of the user is touched, and nothing goes through a proxy."""
    import huggingface_hub.constants

    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PDLIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, value in {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "no_token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    use_hub("http://127.0.0.1:9", monkeypatch)  # nobody answers there


def use_hub(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_ENDPOINT", address)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(Hub()) as server:
        use_hub(server.address, monkeypatch)
        yield server  # type: ignore[misc]
