"""The Python of docs/editing.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from edit_cases import transformer
from torch import nn

from pdlightning import ParameterDecomposition
from pdlightning.metrics import FaithfulnessLoss
from pdlightning.modules import SharedMLP
from pdlightning.targets import TMS

PAGE = Path(__file__).parents[2] / "docs" / "editing.md"


def decomposed(target: nn.Module, sites: dict[str, int]) -> ParameterDecomposition:
    losses = {"faithfulness": FaithfulnessLoss(coeff=1.0)}
    return ParameterDecomposition(
        target=target.requires_grad_(False), sites=sites, ci_fn=SharedMLP(hidden=[4]), losses=losses
    )


def test_every_line_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toy = decomposed(TMS(n_features=5, n_hidden=2, tied=True, seed=0), {"linear*": 6})
    lm = decomposed(transformer("gpt2", tied=True), {"transformer.h.*.c_fc": 5})
    monkeypatch.setattr("pdlightning.loading.load_run", lambda path: SimpleNamespace(decomposition=toy))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names = {"lm": lm, "prompt": torch.tensor([[1, 2, 3]])}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 8
    c, m = names["c"], names["m"]
    assert m.grad[c] != 0
    torch.testing.assert_close(
        names["alone"], toy.masked_forward(names["x"], {"linear1": torch.eye(6)[c].expand(5, 6)})
    )
    more = torch.zeros(5, 6).index_put((torch.tensor(0), torch.as_tensor(c)), torch.tensor(1.0))
    one_more = {site: lower + more * (site == "linear1") for site, lower in names["ci"].lower.items()}
    torch.testing.assert_close(names["added"], toy.masked_forward(names["x"], one_more))
    torch.testing.assert_close(names["model"](names["x"]), names["without"])
    torch.testing.assert_close(names["again"](names["prompt"]).logits, names["smaller"](names["prompt"]).logits)
    assert names["text"].shape == (1, 7)
