"""The recipe of a language model, through the cache of targets."""

from __future__ import annotations

import csv
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from targets.language.markov import BEST_LOSS, MarkovTokens

from pdlightning.data import ByteTokenizer, LocalFiles, Tokens
from pdlightning.targets import CheckResult, UnfitTargetError, obtain_target
from pdlightning.targets.language import BelowUnigramEntropy, LanguageModelRecipe, LlamaSimpleMLP

SHAPE = {"vocab_size": 11, "n_ctx": 8, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_mlp": 32}
CONFIG = {"target": "small"}


def passes(model: Any, data: Any) -> CheckResult:
    return CheckResult(True, "fine", {})


def recipe(**changes: Any) -> LanguageModelRecipe:
    arguments = {
        "model": partial(LlamaSimpleMLP, **SHAPE),
        "data": MarkovTokens,
        "check": passes,
        "steps": 6,
        "lr": 1e-2,
        "warmup_frac": 0.1,
        "final_frac": 0.1,
        "weight_decay": 0.1,
        "clip": 1.0,
        "micro_batches": 1,
        "eval_every": 2,
        "precision": "32-true",
        "seed": 0,
    }
    return LanguageModelRecipe(**arguments | changes)


def obtain(folder: Path, **changes: Any) -> Any:
    return obtain_target(recipe(**changes), config=CONFIG, cache_dir=folder)


def folders(root: Path) -> set[str]:
    return {path.name.partition(".")[2] for path in (root / "targets").iterdir() if path.is_dir()}


def same_weights(a: Any, b: Any) -> bool:
    return all(torch.equal(p, b.state_dict()[name]) for name, p in a.state_dict().items())


def test_a_model_is_pretrained_once_and_found_again_with_its_tied_head(tmp_path: Path) -> None:
    first = obtain(tmp_path)
    again = obtain(tmp_path, data=partial(MarkovTokens, fails_at=0))
    assert same_weights(first.model, again.model) and again.summary == first.summary
    for model in (first.model, again.model):
        assert model.lm_head.weight is model.wte.weight
        assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_its_folder_has_the_losses_as_numbers_and_as_a_figure(tmp_path: Path) -> None:
    folder = obtain(tmp_path).folder
    files = {"weights.safetensors", "target.json", "losses.csv", "losses.png"}
    assert {path.name for path in folder.iterdir()} == files and folders(tmp_path) == {""}
    rows = list(csv.DictReader((folder / "losses.csv").open()))
    summary = json.loads((folder / "target.json").read_text())["summary"]
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert float(rows[-1]["validation"]) == summary["validation_loss"]
    assert float(rows[-1]["train"]) == summary["loss"]
    curve = summary["validation_curve"]
    assert curve == [[int(row["step"]), float(row["validation"])] for row in rows] and len(curve) > 1


def test_an_interrupted_pretraining_goes_on_where_it_was(tmp_path: Path) -> None:
    straight = obtain(tmp_path / "straight")
    with pytest.raises(ConnectionError):
        obtain(tmp_path / "broken", data=partial(MarkovTokens, fails_at=5))
    assert folders(tmp_path / "broken") == {"training"}
    resumed = obtain(tmp_path / "broken", data=partial(MarkovTokens, fails_at=3))
    assert same_weights(straight.model, resumed.model) and folders(tmp_path / "broken") == {""}


def test_other_tokens_make_another_model(tmp_path: Path) -> None:
    """The same config may name another text on another machine."""

    class Others(MarkovTokens):
        fingerprint = "others"  # pyright: ignore[reportAssignmentType]

    assert obtain(tmp_path).folder != obtain(tmp_path, data=Others).folder


def test_a_model_no_better_than_the_frequencies_of_tokens_is_refused_with_both_numbers(tmp_path: Path) -> None:
    check = BelowUnigramEntropy(margin=1.0)
    with pytest.raises(UnfitTargetError, match=r"validation loss 2\.\d+, unigram entropy 2\.398 nats.*1 below.*steps"):
        obtain(tmp_path, check=check)
    assert folders(tmp_path) == {"training"}
    with pytest.raises(UnfitTargetError):  # at once, without training again
        obtain(tmp_path, check=check, data=partial(MarkovTokens, fails_at=0))


def test_the_check_passes_a_model_that_has_learnt(tmp_path: Path) -> None:
    data = partial(MarkovTokens, batch_size=32, eval_batches=8)
    result = obtain(tmp_path, data=data, steps=150, eval_every=75, check=BelowUnigramEntropy(margin=1.5))
    measures = result.summary["measures"]
    assert measures["validation_loss"] == pytest.approx(BEST_LOSS, abs=0.1)
    assert measures["unigram_entropy"] == pytest.approx(2.398, abs=1e-3)
    assert result.summary["validation_loss"] == pytest.approx(measures["validation_loss"], rel=1e-6)


def test_tokens_of_real_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDLIGHTNING_CACHE", str(tmp_path))
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"{i}. The cat sat on the mat, and the dog sat beside it. " * 8)
    corpus = LocalFiles(format="text", train=[str(tmp_path / "*.txt")], column="text", eval_fraction=0.3)
    data = partial(
        Tokens, corpus=corpus, tokenizer=ByteTokenizer(), n_ctx=8, batch_size=16, eval_batches=2, labels="next"
    )
    model = partial(LlamaSimpleMLP, **SHAPE | {"vocab_size": 257})
    result = obtain(
        tmp_path, data=data, model=model, lr=3e-2, steps=200, eval_every=100, check=BelowUnigramEntropy(margin=0.5)
    )
    assert 2 < result.summary["measures"]["unigram_entropy"] < 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": partial(MarkovTokens, vocab_size=12)}, "The tokenizer has 12 ids and the model only 11"),
        ({"data": partial(MarkovTokens, n_ctx=9)}, "Rows of n_ctx 9 tokens are longer than the model's context of 8"),
    ],
)
def test_data_of_another_model_is_refused_before_training(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        obtain(tmp_path, **changes)
    assert folders(tmp_path) == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batches": 0}, "micro_batches of a target recipe must be positive, got 0"),
        ({"eval_every": 0}, "eval_every of a target recipe must be positive, got 0"),
        ({"clip": -1.0}, "clip of a target recipe must be positive, got -1.0"),
        ({"warmup_frac": 2.0}, r"warmup_frac of a target recipe must be in \[0, 1\], got 2.0"),
        ({"lr": 0.0}, "lr of a target recipe must be positive, got 0.0"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(recipe(), **changes)


def test_a_margin_must_be_one() -> None:
    with pytest.raises(ValueError, match="margin must be positive, got 0"):
        BelowUnigramEntropy(margin=0)
