"""Every conf/target of a language model composes and binds, and says what it would fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from pdlightning.__main__ import CONF
from pdlightning.config import ConfigError, to_plain, validate
from pdlightning.targets.language import LanguageModelRecipe

DATA = {"lm": "python_stdlib", "ss": "simplestories", "ts": "tinystories", "pile": "pile", "gpt2": "openwebtext"}
PARAMETERS = {"pile_llama_simple_mlp-4L": 66_931_200, "pile_llama_simple_mlp-12L": 123_566_592}


def language_targets() -> list[str]:
    return sorted(p.stem for p in (CONF / "target").glob("*.yaml") if p.stem.split("_")[0] in (*DATA, "llama3"))


def composed(target: str, *words: str) -> dict[str, Any]:
    data = DATA.get(target.split("_")[0], "openwebtext")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_plain(compose("config", [f"+target={target}", f"+data={data}", "name=x", "steps=1", *words]))


@pytest.mark.parametrize("target", language_targets())
def test_a_target_composes_and_binds_and_fetches_nothing_unasked(target: str) -> None:
    config = composed(target)["target"]
    validate(config, path="target")
    asks = config if "download" in config else config["data"]["tokenizer"] | config["data"]["corpus"]
    assert not asks.get("download")


@pytest.mark.parametrize("target", [t for t in language_targets() if t not in ("gpt2", "llama3_8b")])
def test_a_recipe_fits_its_model_and_can_be_made(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pdlightning.config import instantiate
    from pdlightning.data import TrainedTokenizer

    config = composed(target)["target"]
    assert config["data"]["n_ctx"] == config["model"]["n_ctx"] and config["data"]["labels"] == "next"
    # The tokenizer of a hub dataset is not on every machine.
    config["data"]["tokenizer"] = {"_target_": f"{TrainedTokenizer.__module__}.TrainedTokenizer", "vocab_size": 300}
    recipe = instantiate(config, path="target")
    assert isinstance(recipe, LanguageModelRecipe)
    if target in PARAMETERS:
        assert sum(p.numel() for p in recipe.blank(0).parameters()) == PARAMETERS[target]


@pytest.mark.parametrize("target", ["gpt2", "llama3_8b"])
def test_a_hub_model_is_pinned_to_a_commit(target: str) -> None:
    assert len(composed(target)["target"]["revision"]) == 40


def test_a_hub_model_that_is_not_here_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from pdlightning.build import build_target, mistakes_of_the_user

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="openai-community/gpt2 .* download: true fetches it"), mistakes_of_the_user():
        build_target(composed("gpt2"))
