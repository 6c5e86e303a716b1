"""Every message on the page of errors is what its mistake really brings."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from doc_pages import DOCS
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pdlightning import ParameterDecomposition
from pdlightning.__main__ import main
from pdlightning.data import SparseFeatures
from pdlightning.masking import AllSites, Uniform
from pdlightning.metrics import FaithfulnessLoss, ImportanceMinimalityLoss, OutputMSE, ReconstructionLoss
from pdlightning.modules import SharedMLP
from pdlightning.storage import load_decomposition, save_decomposition

ENTRIES: dict[str, str] = dict(
    re.findall(
        r"^### ([^\n]+)\n\n```text\n(.*?)\n```$", (DOCS / "errors.md").read_text(), flags=re.DOTALL | re.MULTILINE
    )
)
FAST = ("experiment=tms_5-2", "debug=fast")

WORDS: dict[str, tuple[str, ...]] = {
    "No experiment": (),
    "No such choice": ("experiment=tms_52",),
    "No such setting": (*FAST, "seeed=3"),
    "No such argument": (*FAST, "+data.zzz=1"),
    "A value is required": (*FAST, "loss.importance_minimality.p=???"),
    "Wrong type": (*FAST, "steps=abc"),
    "Hydra cannot read": (*FAST, "+pd.sites.linear?=3"),
    "Settings of a loss that is not chosen": (*FAST, "loss=[faithfulness,importance_minimality,stochastic_recon]"),
    "Outside the allowed packages": (*FAST, "+loss.mine={_target_: my_package.losses.Mine, coeff: 1}"),
    "Slow evaluations": (*FAST, "logging.slow_eval_every=4"),
    "Objective": (*FAST, "objective=eval/loss/totl"),
    "Too large for the machine": (*FAST, "pd.sites.linear1=10000000000"),
    "Too few GPUs": (*FAST, "runtime=gpu", "runtime.devices=99"),
    "Nothing to resume": ("resume=elsewhere",),
    "Resume with other settings": ("resume=elsewhere", "steps=3"),
    "A sweep over experiments": ("-m", "experiment=tms_5-2,tms_40-10"),
    "A pattern that matches nothing": (*FAST, "~pd.sites.linear1", "+pd.sites.linearx=3"),
    "A module that cannot be decomposed": (
        "experiment=resid_mlp1", "debug=fast", "~pd.sites", "+pd.sites={layers.0: 3}",
    ),
    "C": (*FAST, "pd.sites.linear1=0"),
    "A target that dropped features": (*FAST, "target_steps=1", "target.max_attempts=1", "check_target=true"),
    "Data of another shape": (*FAST, "data.n_features=7"),
    "A negative coefficient": (*FAST, "loss.faithfulness.coeff=-1"),
    "Squared error of tokens": (
        "experiment=induction", "debug=fast", "comparison._target_=pdlightning.metrics.OutputMSE",
    ),
    "A squash below zero": (*FAST, "pd.squash=leaky"),
}  # fmt: skip


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).requires_grad_(False)


def decomposed(target: nn.Module | None = None, **arguments: Any) -> ParameterDecomposition:
    recon = ReconstructionLoss(coeff=1.0, source=Uniform(), routing=AllSites(), comparison=OutputMSE())
    given = {
        "sites": {"[02]": 3},
        "ci_fn": SharedMLP(hidden=[4]),
        "losses": {"importance": ImportanceMinimalityLoss(coeff=1e-3, p=1.0), "recon": recon},
        **arguments,
    }
    return ParameterDecomposition(target=network() if target is None else target, **given)


def fit(pd: ParameterDecomposition, loader: DataLoader, **arguments: Any) -> None:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    lightning.Trainer(max_steps=2, accelerator="cpu", **quiet, **arguments).fit(pd, loader)


class Answer(nn.Sequential):
    def forward(self, x: Tensor) -> Any:
        return {"answer": super().forward(x)}


class Twice(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[0](self[0](x))


def split_over_ranks(tmp_path: Path) -> None:
    data = SparseFeatures(
        n_features=5, batch_size=10, eval_batches=1, seed=0, generation="at_least_zero", probability=0.5,
        value_range=(0.0, 1.0),
    )  # fmt: skip
    data.trainer = SimpleNamespace(global_rank=0, world_size=4)  # type: ignore[assignment]
    data.own_samples()


def stored(tmp_path: Path, change: Callable[[Path], Any]) -> None:
    save_decomposition(tmp_path / "run", {"V": torch.ones(300)}, {})
    change(tmp_path / "run")
    load_decomposition(tmp_path / "run")


def newer(folder: Path) -> None:
    content = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({**content, "format_version": 99}))


def flipped(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def truncated(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


CALLS: dict[str, Callable[[Path], Any]] = {
    "Batch and ranks": split_over_ranks,
    "Two patterns for one module": lambda _: decomposed(sites={"0": 2, "*": 2}),
    "A target that trains": lambda _: decomposed(network().requires_grad_(True)),
    "Sites already there": lambda _: decomposed(decomposed().target),
    "A site that runs twice": lambda _: decomposed(
        Twice(nn.Linear(4, 4)).requires_grad_(False), sites={"0": 2}
    ).causal_importances(torch.ones(2, 4)),
    "Nothing to train": lambda _: decomposed(losses={"faithfulness": FaithfulnessLoss(coeff=0.0)}),
    "Clipping all as one": lambda _: fit(
        decomposed(), DataLoader(torch.randn(8, 4), batch_size=4), gradient_clip_val=1.0
    ),
    "A batch of another kind": lambda _: decomposed().causal_importances(SimpleNamespace(x=torch.ones(2, 4))),
    "A result of another kind": lambda _: decomposed(Answer(*network())).causal_importances(torch.ones(2, 4)),
    "One sample instead of a batch": lambda _: fit(decomposed(), DataLoader(list(torch.randn(3, 4)), batch_size=None)),
    "An unknown site": lambda _: decomposed().masked_forward(torch.ones(2, 4), masks={"nowhere": torch.ones(2, 3)}),
    "Not finite": lambda _: fit(decomposed(), DataLoader(torch.full((8, 4), torch.nan), batch_size=4)),
    "Not a decomposition": lambda path: stored(path, lambda folder: (folder / "metadata.json").unlink()),
    "A newer format": lambda path: stored(path, newer),
    "Changed files": lambda path: stored(path, flipped),
    "Truncated files": lambda path: stored(path, truncated),
}


def assert_says(heading: str, message: str) -> None:
    """The parts of the documented sentence, between the dots, stand in the message in their order."""
    found, said = 0, " ".join(message.split())
    for part in ENTRIES[heading].split("…"):
        found = said.find(part.strip(), found)
        assert found >= 0, f"docs/errors.md has {ENTRIES[heading]!r}, but the message is {message!r}"


def test_every_message_has_its_cause() -> None:
    assert len(ENTRIES) >= 25 and not WORDS.keys() & CALLS.keys()
    assert sorted(ENTRIES) == sorted([*WORDS, *CALLS])


@pytest.mark.parametrize("heading", list(WORDS))
def test_a_command_says_what_the_page_says(
    heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PDLIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["pdlightning", *WORDS[heading]])
    with pytest.raises(SystemExit) as end:
        main()
    assert isinstance(end.value.code, str) and "Traceback" not in capsys.readouterr().err
    assert_says(heading, end.value.code)


@pytest.mark.parametrize("heading", list(CALLS))
def test_python_says_what_the_page_says(heading: str, tmp_path: Path) -> None:
    with pytest.raises(Exception) as raised:
        CALLS[heading](tmp_path)
    assert_says(heading, str(raised.value))
