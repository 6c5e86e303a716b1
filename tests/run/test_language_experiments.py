"""Every experiment on a language model runs, on a stand-in of the same architecture made here, without a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from run.conftest import summary_of

from pdlightning.__main__ import CONF
from pdlightning.run import run

Composed = Callable[..., dict[str, Any]]
VOCAB, N_CTX, LLAMA_BLOCKS = 300, 16, 19  # llama3_8b-l18 decomposes the block of that number


def language_experiments() -> list[str]:
    """Those whose file, or the one it builds on, follows the recipe for language models."""

    def follows(name: str) -> bool:
        defaults = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text()).get("defaults", [])
        bases = [d for d in defaults if isinstance(d, str) and d in names]
        return {"/recipe": "language_model"} in defaults or any(map(follows, bases))

    names = {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    return sorted(name for name in names if follows(name))


def stand_ins() -> list[Any]:
    """The figures of 72 sites take a minute; what has four layers is, with two, what is called so."""
    slow = ("pile_llama_simple_mlp-12L", "ss_llama_simple_mlp")
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in language_experiments()]


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    texts = (" ".join(f"the {i * k % 97} of {k}" for k in range(60)) for i in range(80))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def hub_models(tmp_path_factory: pytest.TempPathFactory, documents: Path) -> dict[str, Path]:
    """Tiny GPT-2 and Llama in folders, as `save_pretrained` writes them, each with its tokenizer."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train([str(documents)], vocab_size=VOCAB, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    vocab = len(tokenizer)
    torch.manual_seed(0)
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=N_CTX, vocab_size=vocab)),
        "llama3_8b-l18": LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=LLAMA_BLOCKS, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=vocab, max_position_embeddings=N_CTX,
            )
        ),
    }  # fmt: skip
    folders = {name: tmp_path_factory.mktemp(name) for name in models}
    for name, model in models.items():
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def stand_in(config: dict[str, Any], documents: Path, folder: Path | None) -> None:
    """The same classes everywhere, in sizes for a test; what would come from the hub comes from `folder`."""
    corpus = {
        "_target_": "pdlightning.data.LocalFiles", "format": "json", "column": "text", "train": [str(documents)],
        "eval_fraction": 0.2, "streaming": config["data"]["corpus"].get("streaming", False),
    }  # fmt: skip
    trained = {"_target_": "pdlightning.data.TrainedTokenizer", "vocab_size": VOCAB}
    data = {"corpus": corpus, "tokenizer": trained, "n_ctx": N_CTX, "batch_size": 4}
    if folder is None:
        sizes = {"vocab_size": VOCAB, "n_ctx": N_CTX, "d_model": 16, "n_heads": 4, "d_mlp": 32}
        config["target"]["model"] |= sizes
        if config["pd"]["ci_fn"]["_target_"].endswith("GlobalTransformer"):
            config["target"]["model"]["n_layers"] = 2  # most of the time goes into figures; chunks name their layers
        config["target"]["data"] |= data | {"eval_batches": 1}
        config["target"] |= {"precision": "32-true", "micro_batches": 1}
    else:
        config["target"] |= {"name_or_path": str(folder), "revision": None}
        tokenizer = {"name_or_path": str(folder), "revision": None}
        data["tokenizer"] = config["data"]["tokenizer"] | tokenizer
    config["data"] |= data
    config["ci_fn"] |= {"d_model": 16, "n_heads": 2, "n_blocks": 1, "mlp_hidden": [16]}
    config["pd"]["ci_fn"] |= config["ci_fn"]
    config["pd"]["sites"] = dict.fromkeys(config["pd"]["sites"], 8)


@pytest.mark.parametrize("experiment", stand_ins())
def test_an_experiment_runs_on_a_stand_in(
    composed: Composed, documents: Path, hub_models: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, experiment: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("PDLIGHTNING_CACHE", str(tmp_path / "cache"))
    config = composed(f"experiment={experiment}", "debug=fast", "runtime.keep_memory=false")
    stand_in(config, documents, hub_models.get(experiment))
    run(config, tmp_path / "run")
    summary = summary_of(tmp_path / "run")
    assert summary["experiment"] == experiment
    assert {"eval/ce_kl/kl_unmasked", "eval/ci_l0_0/total", "eval/pgd_ladder/steps_2"} <= summary["metrics"].keys()
    assert "<html" in (tmp_path / "run" / "figures" / "examples.html").read_text()
