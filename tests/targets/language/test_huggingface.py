"""Models of transformers: loaded by path or from the cache of the hub, decomposed, and refused in words."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from parity import seeded
from torch import Tensor, nn

from pdlightning.modules import ComponentModel, SharedMLP
from pdlightning.targets.language import huggingface_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tokens(*shape: int) -> Tensor:
    return torch.randint(23, shape, generator=seeded(0))


def saved(model: Any, folder: Path) -> Path:
    for i, parameter in enumerate(model.parameters()):
        parameter.data.normal_(std=0.4, generator=seeded(i))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2, with its dropout and its tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 23, "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    return saved(model, tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with grouped queries, biases on its attention and a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 23, "max_position_embeddings": 12, "hidden_size": 8, "intermediate_size": 20}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, attention_dropout=0.3))
    return saved(model, tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def models(gpt2: Path, llama: Path) -> dict[str, Path]:
    return {"gpt2": gpt2, "llama": llama}


SITES = {
    "gpt2": {"transformer.wte": 6, "transformer.h.*.c_*": 5, "lm_head": 7},
    "llama": {"model.embed_tokens": 6, "model.layers.*_proj": 5, "lm_head": 7},
}
KINDS = {"gpt2": {"embedding", "conv1d", "linear"}, "llama": {"embedding", "linear"}}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_all_masks_and_delta_masks_at_one_give_the_logits_of_the_target(models: dict[str, Path], name: str) -> None:
    target = huggingface_model(name_or_path=str(models[name]), dtype="float64")
    rows = tokens(3, 9)
    before = target(rows).logits
    model = ComponentModel(target=target, sites=SITES[name], ci_fn=SharedMLP(hidden=[2]))
    assert {c.kind for c in model.components.values()} == KINDS[name]
    assert len(model.components) == {"gpt2": 4, "llama": 7}[name] * 2 + 2
    ones = torch.ones(3, 9, dtype=torch.float64)
    masks = {path: ones.unsqueeze(-1).expand(-1, -1, c.C) for path, c in model.components.items()}
    masked = model.masked(rows, masks, delta_masks=dict.fromkeys(masks, ones))
    torch.testing.assert_close(model.clean(rows).output, before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(masked.output, before, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model.masked(rows, masks).output, before, atol=1e-2)
    assert torch.equal(model.restore()(rows).logits, before)


@torch.no_grad()
def test_a_tied_head_and_its_embedding_are_decomposed_apart(gpt2: Path) -> None:
    """Spec C7."""
    target, rows = huggingface_model(name_or_path=str(gpt2), dtype="float32"), tokens(2, 5)
    assert target.get_submodule("lm_head").weight is target.get_submodule("transformer.wte").weight
    model = ComponentModel(target=target, sites={"transformer.wte": 3, "lm_head": 3}, ci_fn=SharedMLP(hidden=[2]))
    clean = model.clean(rows, outputs=True)
    head = model.masked(rows, {"lm_head": torch.zeros(2, 5, 3)}, outputs=True)
    assert torch.equal(head.outputs["transformer.wte"], clean.outputs["transformer.wte"]) and not head.output.any()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_is_frozen_and_the_same_in_every_forward(models: dict[str, Path], name: str) -> None:
    model: Any = huggingface_model(name_or_path=str(models[name]), dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    result = model(tokens(2, 12))
    assert result.past_key_values is None
    again = copy.deepcopy(model).train()  # even so there is no dropout
    assert torch.equal(again(tokens(2, 12)).logits, result.logits)
    assert model.loaded_from == {"name_or_path": str(models[name]), "revision": None, "commit": None}


def test_a_forward_can_be_recomputed(llama: Path) -> None:
    """Activation checkpointing gives the same gradients."""
    model = huggingface_model(name_or_path=str(llama), dtype="float64")
    gradients = []
    for forward in (lambda x: model(inputs_embeds=x).logits, lambda x: checkpointed(model, x)):
        x = torch.randn(2, 7, 8, dtype=torch.float64, generator=seeded(1)).requires_grad_()
        forward(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda e: model(inputs_embeds=e).logits, x, use_reentrant=False)


def test_rotary_frequencies_survive_a_change_of_type(llama: Path) -> None:
    model = huggingface_model(name_or_path=str(llama), dtype="float32")
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    for changed in (copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).double().bfloat16()):
        assert {p.dtype for p in changed.parameters()} == {torch.bfloat16}
        buffers = dict(changed.named_buffers())
        assert before and all(torch.equal(buffers[name], value) for name, value in before.items())
        assert changed.to("meta").get_buffer(next(iter(before))).device.type == "meta"


def test_a_class_may_be_given_by_its_path(gpt2: Path) -> None:
    from transformers import GPT2LMHeadModel, GPT2Model

    path = str(gpt2)
    for chosen in (GPT2LMHeadModel, GPT2Model):
        model = huggingface_model(name_or_path=path, dtype="float32", class_path=f"transformers.{chosen.__name__}")
        assert type(model) is chosen


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and a hub that counts who asks and does not answer."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def no_answer(self: HfApi, name: str, **_: Any) -> None:
        names.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", no_answer)
    return names


def in_cache(cache: Path, model: Path) -> None:
    """What a download leaves behind: a folder per commit, and which commit `main` was."""
    repository = cache / "models--owner--tiny"
    shutil.copytree(model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.mark.parametrize("revision", ["main", COMMIT])
@pytest.mark.parametrize("download", [True, False])
def test_a_hub_name_is_loaded_from_the_cache_and_its_commit_recorded(
    hub_cache: Path, asked: list[str], gpt2: Path, revision: str, download: bool
) -> None:
    in_cache(hub_cache, gpt2)
    model: Any = huggingface_model(name_or_path="owner/tiny", revision=revision, dtype="float32", download=download)
    assert model.loaded_from == {"name_or_path": "owner/tiny", "revision": revision, "commit": COMMIT}
    assert not asked


def test_a_run_writes_down_what_was_loaded(hub_cache: Path, gpt2: Path) -> None:
    from pdlightning.build import build_target, make_target

    in_cache(hub_cache, gpt2)
    arguments = {"name_or_path": "owner/tiny", "revision": "main", "dtype": "float32"}
    config = {"target": {"_target_": "pdlightning.targets.language.huggingface_model", **arguments}, "allow": []}
    summary = make_target(config, build_target(config)).summary
    assert summary["loaded_from"] == {"name_or_path": "owner/tiny", "revision": "main", "commit": COMMIT}


def refused(**arguments: Any) -> str:
    with pytest.raises(ValueError) as error:
        huggingface_model(**{"dtype": "float32"} | arguments)
    return str(error.value)


def test_nothing_is_downloaded_unless_asked(hub_cache: Path, asked: list[str]) -> None:
    message = refused(name_or_path="owner/tiny", revision="main")
    assert f"owner/tiny at revision main is not in the cache of this machine ({hub_cache})" in message
    assert "download: true fetches it" in message and "`hf download owner/tiny --revision main`" in message
    assert not asked


def test_a_hub_that_does_not_answer_is_asked_once(hub_cache: Path, asked: list[str]) -> None:
    message = refused(name_or_path="owner/tiny", revision="main", download=True)
    assert "does not answer (Name or service not known)" in message and "hf download owner/tiny" in message
    assert asked == ["owner/tiny"]


def test_the_offline_switch_of_the_hub_is_respected(
    hub_cache: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused(name_or_path="owner/tiny", revision="main", download=True)
    assert "HF_HUB_OFFLINE is set: unset it" in message and not asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name_or_path": "./nowhere"}, "there is no folder"),
        ({"name_or_path": "/no/such/model"}, "there is no folder /no/such/model."),
        ({"name_or_path": "owner/tiny"}, "revision is missing: 'owner/tiny' is no folder here"),
        ({"name_or_path": "GPT2", "revision": "main"}, "drop revision=main"),
        ({"name_or_path": "EMPTY"}, "holds no model that AutoModelForCausalLM can load"),
        ({"name_or_path": "GPT2", "class_path": "transformers.GPT2LMHeadModl"}, "did you mean 'GPT2LMHeadModel'?"),
        ({"name_or_path": "GPT2", "class_path": "transformer.X"}, "cannot import 'transformer' for 'transformer.X'"),
        ({"name_or_path": "GPT2", "class_path": "transformers.GPT2Config"}, "expected a class of models"),
        (
            {"name_or_path": "GPT2", "class_path": "transformers.LlamaForCausalLM"},
            "is a gpt2, and the class wants a llama",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_words(
    gpt2: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    places = {"GPT2": str(gpt2), "EMPTY": str(tmp_path)}
    name = arguments["name_or_path"]
    assert message in refused(**arguments | {"name_or_path": places.get(name, name)})


def test_weights_that_are_missing_are_not_made_up(llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaModel

    LlamaModel.from_pretrained(llama).save_pretrained(tmp_path / "headless")
    message = refused(name_or_path=str(tmp_path / "headless"))
    assert "lacks 1 weights of LlamaForCausalLM (lm_head.weight)" in message and "class_path" in message


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("call", [lambda m, x: m(x), lambda m, x: m(input_ids=x)])
def test_tokens_that_do_not_fit_are_refused(models: dict[str, Path], name: str, call: Callable[..., Any]) -> None:
    """Llama would compute nonsense, and GPT-2 fail without saying why."""
    model = huggingface_model(name_or_path=str(models[name]), dtype="float32")
    with pytest.raises(ValueError, match="sequence has 13 tokens.*at most 12"):
        call(model, tokens(1, 13))
    with pytest.raises(ValueError, match="range from 0 to 23, but this model knows 0 to 22"):
        call(model, torch.tensor([[0, 23]]))
