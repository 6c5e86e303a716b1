"""The Python of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"


def test_the_ten_lines_decompose_a_model(monkeypatch) -> None:
    first = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0]
    monkeypatch.setattr("lightning.Trainer", quiet_trainer())
    model = nn.Sequential()
    model.layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model.forward = model.layers.forward
    names = {"model": model, "loader": torch.utils.data.DataLoader(torch.randn(64, 4).unbind(), batch_size=8)}
    exec(first, names)
    pd, batch = names["pd"], torch.randn(2, 4)
    assert list(pd.components) == ["layers.0", "layers.2"]
    ci = pd.causal_importances(batch).lower
    assert ci["layers.0"].shape == (2, 100)
    assert pd.masked_forward(batch, masks=ci).shape == (2, 3)
    assert torch.isfinite(pd.components["layers.0"].V).all()


def quiet_trainer():
    import lightning

    def trainer(*, max_steps: int):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        return original(max_steps=min(max_steps, 5), **quiet)

    original = lightning.Trainer
    return trainer
