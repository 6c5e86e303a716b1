"""Pretraining: the optimizer, gradient accumulation, the losses, and going on to the same bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from targets.language.markov import BEST_LOSS, MarkovTokens
from torch import Tensor, nn

from pdlightning.functional.schedules import schedule_value
from pdlightning.targets.language import (
    GPT2Simple,
    LanguageModelTraining,
    LlamaSimpleMLP,
    next_token_loss,
    validation_loss,
)
from pdlightning.targets.language.training import pretrain

SHAPE = {"vocab_size": 11, "n_ctx": 8, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_mlp": 32, "seed": 0}


def training(**changes: Any) -> LanguageModelTraining:
    arguments = {
        "model": LlamaSimpleMLP(**SHAPE),
        "steps": 10,
        "lr": 1e-2,
        "warmup_frac": 0.3,
        "final_frac": 0.1,
        "weight_decay": 0.1,
        "clip": 0.5,
        "micro_batches": 1,
    }
    return LanguageModelTraining(**arguments | changes)


def run(folder: Path, module: LanguageModelTraining, data: Any = None, **changes: Any) -> list[dict[str, float]]:
    arguments = {"accelerator": "cpu", "precision": "32-true", "eval_every": 3, "workspace": folder}
    return pretrain(module, data or MarkovTokens(), **arguments | changes)


def weights(module: LanguageModelTraining) -> list[Tensor]:
    return list(module.model.parameters())


def naive_training(model: nn.Module, steps: int) -> list[float]:
    """AdamW of matrices and of the rest, by the formulas."""
    parameters, losses = list(model.parameters()), []
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step in range(steps):
        x, y = MarkovTokens().batch(step)
        p_label = model(x).softmax(-1).gather(-1, y.unsqueeze(-1))
        loss = -p_label.log().mean()
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        lr = schedule_value(step, steps, 1e-2, "cosine", 0.3, 0.1)
        with torch.no_grad():
            for p, g, (m, v) in zip(parameters, gradients, moments, strict=True):
                g = g * min(1.0, 0.5 / (norm + 1e-6))
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                if p.ndim == 2:
                    p.mul_(1 - lr * 0.1)
                unbiased = (v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                p.sub_(lr * (m / (1 - 0.9 ** (step + 1))) / unbiased)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_pretraining_is_adamw_on_the_next_token_in_however_many_parts(tmp_path: Path, micro_batches: int) -> None:
    reference = LlamaSimpleMLP(**SHAPE)
    losses = naive_training(reference, 10)
    module = training(micro_batches=micro_batches)
    rows = run(tmp_path, module)
    for ours, theirs in zip(weights(module), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert [row["step"] for row in rows] == [3, 6, 9, 10]
    means = [sum(losses[a:b]) / (b - a) for a, b in ((0, 3), (3, 6), (6, 9), (9, 10))]
    assert [row["train"] for row in rows] == pytest.approx(means, rel=1e-4)
    assert rows[-1]["validation"] == pytest.approx(validation_loss(module.model, MarkovTokens()), rel=1e-6)


def test_only_matrices_decay() -> None:
    module = training(model=GPT2Simple(**SHAPE, norm="layer"))
    decays = {
        id(p): group["weight_decay"] for group in module.configure_optimizers().param_groups for p in group["params"]
    }
    by_name = {name: decays[id(p)] for name, p in module.model.named_parameters()}
    plain = {name for name in by_name if name.endswith("bias") or "norm" in name}
    assert {name for name, decay in by_name.items() if decay == 0.0} == plain and len(plain) == 6 + 2 * 2 + 2
    assert {decay for name, decay in by_name.items() if name not in plain} == {0.1}


def test_the_next_token_loss_is_a_mean_over_all_positions() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 0, 4], [2, 2, 3]])
    expected = -sum(math.log(logits[b, t].softmax(-1)[labels[b, t]]) for b in range(2) for t in range(3)) / 6
    assert next_token_loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_the_validation_loss_does_not_depend_on_how_many_rows_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaSimpleMLP(**SHAPE)
    whole = validation_loss(model, MarkovTokens())
    monkeypatch.setattr("pdlightning.targets.language.training.LOGITS_AT_ONCE", 8 * 11 * 3)
    assert validation_loss(model, MarkovTokens()) == pytest.approx(whole, rel=1e-6)
    x, y = (torch.cat(parts) for parts in zip(*MarkovTokens().val_dataloader(), strict=True))
    assert whole == pytest.approx(next_token_loss(model(x), y).item(), rel=1e-6)


def test_a_model_learns_what_can_be_known(tmp_path: Path) -> None:
    rows = run(tmp_path, training(steps=150), MarkovTokens(batch_size=32, eval_batches=8), eval_every=50)
    assert BEST_LOSS - 0.05 < rows[-1]["validation"] < BEST_LOSS + 0.1 < math.log(11) - 1


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("fails_at", [4, 6, 9])
def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path: Path, micro_batches: int, fails_at: int) -> None:
    straight = training(micro_batches=micro_batches)
    rows = run(tmp_path / "straight", straight)
    with pytest.raises(ConnectionError):
        run(tmp_path / "broken", training(micro_batches=micro_batches), MarkovTokens(fails_at=fails_at))
    torch.rand(3)  # the global generator plays no part
    resumed = training(micro_batches=micro_batches)
    assert run(tmp_path / "broken", resumed) == rows
    assert all(torch.equal(p, q) for p, q in zip(weights(straight), weights(resumed), strict=True))
    assert (tmp_path / "broken" / "losses.csv").read_text() == (tmp_path / "straight" / "losses.csv").read_text()


def test_a_training_goes_on_from_its_newest_checkpoint_and_not_from_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        run(tmp_path, training(), MarkovTokens(fails_at=7))
    with pytest.raises(ConnectionError):  # batch 5 is not read again
        run(tmp_path, training(), MarkovTokens(fails_at=9))
    run(tmp_path, training(), MarkovTokens(fails_at=5))
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"step=9.ckpt", "step=10.ckpt"}
    finished = run(tmp_path, training(), MarkovTokens(fails_at=0))
    assert finished[-1]["step"] == 10


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    straight = training()
    run(tmp_path / "straight", straight)
    with pytest.raises(ConnectionError):
        run(tmp_path / "broken", training(), MarkovTokens(fails_at=7))
    newest = tmp_path / "broken" / "step=6.ckpt"
    newest.write_bytes(newest.read_bytes()[:-40])
    resumed = training()
    with pytest.warns(UserWarning, match="falling back to the checkpoint before it"):
        run(tmp_path / "broken", resumed)
    assert all(torch.equal(p, q) for p, q in zip(weights(straight), weights(resumed), strict=True))


def test_a_diverging_training_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation loss nan at step 3: lower its lr, now 1e\+30"):
        run(tmp_path, training(lr=1e30))
    assert not list(tmp_path.glob("*.ckpt"))


def test_pretraining_leaves_the_global_generator_alone_and_gives_the_data_back(tmp_path: Path) -> None:
    state, data = torch.get_rng_state(), MarkovTokens()
    run(tmp_path, training(), data)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(next(iter(data.train_dataloader()))[0], data.batch(0)[0])


def test_in_mixed_precision_the_weights_stay_float32(tmp_path: Path) -> None:
    whole, mixed = training(), training()
    expected, rows = run(tmp_path / "whole", whole), run(tmp_path / "mixed", mixed, precision="bf16-mixed")
    assert {p.dtype for p in weights(mixed)} == {torch.float32}
    assert not any(torch.equal(p, q) for p, q in zip(weights(whole), weights(mixed), strict=True))
    for name in ("train", "validation"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in expected], abs=0.02)
