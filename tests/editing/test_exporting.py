"""Exported models are ordinary, compute what the intervention computes, and come back from disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_cases import drawn, edits_of, transformer
from parity import Chain, assert_same, batch_of, built, frozen, seeded
from torch import Tensor, nn

from pdlightning.editing.exporting import ExportError, export, load_exported, plain_copy
from pdlightning.editing.interventions import Intervention
from pdlightning.modules import ComponentModel, SharedMLP
from pdlightning.modules.site import StandIn
from pdlightning.storage import StorageError
from pdlightning.targets import TMS
from pdlightning.targets.language import GPT2Simple


def decomposed(target: nn.Module, sites: dict[str, int]) -> ComponentModel:
    return ComponentModel(target=target.requires_grad_(False), sites=sites, ci_fn=SharedMLP(hidden=[2]))


def edited(model: ComponentModel, batch: Any, **edits: Any) -> Tensor:
    with Intervention(model, **edits), torch.no_grad():
        return model.output(model.run_batch(model.target, batch))


@pytest.mark.parametrize("name", list(edits_of("vectors")))
@pytest.mark.parametrize("data", ["vectors", "tokens"])
def test_weights_of_every_kind_do_what_the_intervention_does(float64, data: str, name: str) -> None:
    model, batch, other = built(data), batch_of(data, (2, 3)), batch_of(data, (4,), seed=1)
    edits = edits_of(data)[name][0]
    before = copy.deepcopy(model.target.state_dict())
    exported = export(Intervention(model, **edits), batch)
    assert type(exported) is type(model.target)
    assert not [m for m in exported.modules() if isinstance(m, StandIn)]
    assert {n: p.shape for n, p in exported.named_parameters()} == {
        n: p.shape for n, p in plain_copy(model.target).named_parameters()
    }
    assert not any(p.requires_grad for p in exported.parameters())
    assert_same(exported(other), edited(model, other, **edits))
    for parameter in exported.parameters():
        parameter.zero_()
    assert all(torch.equal(x, before[n]) for n, x in model.target.state_dict().items()), "it shares nothing with us"


@pytest.mark.parametrize("data", ["vectors", "tokens"])
def test_an_edit_is_of_the_weight_alone_and_leaves_no_rounding(data: str) -> None:
    """float32: W - U_1 V_1^T to the last bit, and biases as they are."""
    model = built(data)
    exported = export(Intervention(model, ablate={path: [1] for path in model.components}), batch_of(data, (3,)))
    for path, c in model.components.items():
        if c.kind != "identity" and f"{path}.pre_identity" not in model.components:
            kept = c.target_weight - torch.outer(c.U[1], c.V[:, 1]).detach()
            stored = exported.get_submodule(path).weight
            assert torch.equal(stored if c.kind == "linear" else stored.T, kept)  # type: ignore[union-attr, arg-type]
    assert torch.equal(
        export(Intervention(model), batch_of(data, (3,)))(batch_of(data, (5,))), model.target(batch_of(data, (5,)))
    )


@pytest.mark.parametrize("data", ["vectors", "tokens"])
def test_replaced_vectors_are_in_the_weights(float64, data: str) -> None:
    model, batch = built(data), batch_of(data, (2, 3))
    for path, c in model.components.items():
        edits = {"V": {path: {0: drawn(c.d_in)}}, "U": {path: drawn(c.C, c.d_out)}, "scale": {path: {1: 0.5}}}
        assert_same(export(Intervention(model, **edits), batch)(batch), edited(model, batch, **edits))


class Stack(nn.Module):
    """A residual block, a container, one linear layer at two places, and an embedding that a head shares."""

    def __init__(self, *, through_code: bool = False) -> None:
        super().__init__()
        self.embed, shared = nn.Embedding(5, 3), nn.Linear(3, 3)
        self.first, self.second = shared, shared
        self.block = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.through_code = through_code

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.second(torch.relu(self.first(self.embed(tokens))))
        h = h + self.block(h)
        return nn.functional.linear(h, self.embed.weight) if self.through_code else self.head(h)


@pytest.mark.parametrize("site", ["embed", "head", "first", "second", "block.pre_identity", "block.0.pre_identity"])
def test_places_that_share_come_apart_and_maps_are_inserted(float64, site: str, tmp_path: Path) -> None:
    sites = ["embed", "head", "first", "second", "block", "block.0"]
    model = decomposed(Stack(), dict.fromkeys(sites[:4], 3) | {"block.pre_identity": 2, "block.0.pre_identity": 2})
    batch, edits = torch.arange(5).repeat(2, 1), {"scale": {site: {0: 3.0}}}
    exported = export(Intervention(model, **edits), batch, path=tmp_path / "model")
    assert_same(exported(batch), edited(model, batch, **edits))
    assert not torch.allclose(exported(batch), model.target(batch))
    assert (exported.embed.weight is exported.head.weight) == (site not in ("embed", "head"))
    read = load_exported(tmp_path / "model", like=model.target)
    assert torch.equal(read(batch), exported(batch))
    assert not any(p.requires_grad for p in read.parameters())
    assert torch.equal(plain_copy(model.target)(batch), model.target(batch))


def test_both_an_identity_and_the_layer_behind_it(float64, tmp_path: Path) -> None:
    model = decomposed(Stack(), {"block.pre_identity": 3, "block.0": 2, "block.0.pre_identity": 2, "first": 2})
    batch, edits = torch.arange(5).unsqueeze(0), {"delta": False}
    exported = export(Intervention(model, **edits), batch, path=tmp_path / "model")
    assert_same(exported(batch), edited(model, batch, **edits))
    assert torch.equal(load_exported(tmp_path / "model", like=Stack())(batch), exported(batch))
    nested = decomposed(frozen(Chain({"a": Chain({"b": Chain({"c": nn.Linear(3, 3)})})})), {"a*.pre_identity": 2})
    assert len(nested.components) == 3
    x = drawn(4, 3)
    exported = export(Intervention(nested, delta=False), x, path=tmp_path / "nested")
    assert_same(exported(x), edited(nested, x, delta=False))
    assert torch.equal(load_exported(tmp_path / "nested", like=nested.target)(x), exported(x))


def test_an_exported_model_may_be_decomposed_in_its_turn(float64) -> None:
    model = decomposed(Stack(), {"block.pre_identity": 3})
    batch, edits = torch.arange(5).unsqueeze(0), {"delta": False}
    exported = export(Intervention(model, **edits), batch)
    again = decomposed(exported, {"block.pre_identity": 2, "first": 2})
    again.restore()
    assert_same(exported(batch), edited(model, batch, **edits))


def test_code_that_reads_a_weight_past_its_module_is_found_out(tmp_path: Path) -> None:
    model = decomposed(Stack(through_code=True), {"embed": 2})
    with pytest.raises(ExportError, match=r"differs from the masked forward by up to .* outside its module\?"):
        export(Intervention(model, scale={"embed": {0: 3.0}}), torch.arange(5), path=tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("edits", "own"),
    [
        ({}, []),
        ({"ablate": {"linear1": [0]}}, ["linear2.weight"]),
        ({"ablate": {"linear2": [0]}}, ["linear2.weight"]),
        ({"delta": False}, ["linear2.weight"]),
    ],
)
def test_a_tied_toy_is_exported_untied_where_it_must(edits: dict[str, Any], own: list[str], tmp_path: Path) -> None:
    model = decomposed(TMS(n_features=5, n_hidden=2, tied=True, seed=0), {"linear1": 3, "linear2": 4})
    x = torch.rand(6, 5, generator=seeded(0))
    exported = export(Intervention(model, **edits), x, path=tmp_path / "model")
    torch.testing.assert_close(exported(x), edited(model, x, **edits))
    assert sorted(exported.state_dict()) == sorted(["linear1.weight", "linear2.bias", *own])
    assert torch.equal(load_exported(tmp_path / "model", like=model.target)(x), exported(x))
    if own:
        untied = TMS(n_features=5, n_hidden=2, tied=False, seed=1)
        untied.load_state_dict(exported.state_dict())
        assert torch.equal(untied(x), exported(x))


def test_a_head_that_reads_the_embedding_keeps_its_own(float64, tmp_path: Path) -> None:
    target = GPT2Simple(vocab_size=7, n_ctx=4, d_model=4, n_layers=1, n_heads=2, d_mlp=6, norm="layer", seed=0)
    model = decomposed(target, {"wte": 3, "h.*.mlp.c_fc": 2, "lm_head": 2})
    tokens = torch.randint(7, (2, 4), generator=seeded(0))
    cases = ({"ablate": {"wte": [0]}}, {"ablate": {"lm_head": [0]}}, {"keep": {"h.0.mlp.c_fc": [1]}})
    for number, edits in enumerate(cases):
        path = tmp_path / str(number)
        exported = export(Intervention(model, **edits), tokens, path=path)
        assert_same(exported(tokens), edited(model, tokens, **edits))
        assert ("lm_head.weight" in exported.state_dict()) == ("keep" not in edits)
        assert torch.equal(load_exported(path, like=target)(tokens), exported(tokens))


def test_what_is_there_already_is_not_written_over(tmp_path: Path) -> None:
    model, x = decomposed(TMS(n_features=5, n_hidden=2, tied=True, seed=0), {"linear1": 3}), torch.eye(5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(StorageError, match="mine exists already: give another path"):
        export(Intervention(model, ablate={"linear1": [0]}), x, path=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


LANGUAGE_SITES = {
    "gpt2": {"transformer.wte": 6, "transformer.h.*.c_*": 5, "lm_head": 7},
    "llama": {"model.embed_tokens": 6, "model.layers.*_proj": 5, "lm_head": 7},
}
EMBEDDING = {"gpt2": "transformer.wte", "llama": "model.embed_tokens"}
INNER = {"gpt2": "transformer.h.1.mlp.c_fc", "llama": "model.layers.1.mlp.up_proj"}


@pytest.mark.parametrize("where", ["embedding", "head", "inner", "all"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_transformers_models_generate_and_come_back(name: str, tied: bool, where: str, tmp_path: Path) -> None:
    """Inside the intervention, with and without a cache, and by the exported model read from disk: the same tokens."""
    target = transformer(name, tied=tied)
    model = decomposed(target, LANGUAGE_SITES[name])
    tokens = torch.randint(1, 23, (3, 5), generator=seeded(0))
    site = {"embedding": EMBEDDING[name], "head": "lm_head", "inner": INNER[name]}
    edits: dict[str, Any] = {"delta": False} if where == "all" else {"scale": {site[where]: {0: 3.0, 2: -1.0}}}
    exported = export(Intervention(model, **edits), {"input_ids": tokens}, path=tmp_path / "model")
    read = type(target).from_pretrained(tmp_path / "model").eval()
    logits = edited(model, tokens, **edits)
    assert not torch.allclose(target(tokens).logits, logits, atol=0.1)
    for ordinary in (exported, read):
        torch.testing.assert_close(ordinary(tokens).logits, logits, rtol=1e-3, atol=1e-4)
        assert ordinary.config.tie_word_embeddings == (tied and where == "inner")
    assert target.config.tie_word_embeddings == tied
    length = {"max_new_tokens": 5, "do_sample": False}
    with Intervention(model, **edits):
        written = target.generate(tokens, **length)
        assert torch.equal(written, target.generate(tokens, use_cache=False, **length))
    assert torch.equal(written, read.generate(tokens, **length))
    exported.tie_weights(recompute_mapping=False)  # as transformers does on its own
    torch.testing.assert_close(exported(tokens).logits, logits, rtol=1e-3, atol=1e-4)
    if where == "inner":
        assert read.num_parameters() == transformer(name, tied=tied).num_parameters(), "what stayed tied is stored once"


def test_an_inserted_map_is_no_file_of_transformers(tmp_path: Path) -> None:
    sites = {"transformer.h.0.mlp.pre_identity": 3, "transformer.h.0.mlp.c_fc.pre_identity": 3}
    model = decomposed(transformer("gpt2", tied=True), sites)
    tokens = torch.randint(1, 23, (3, 5), generator=seeded(0))
    mlp, c_fc = ({"scale": {site: {0: 3.0}}} for site in sites)
    exported = export(Intervention(model, **mlp), tokens)
    assert exported.transformer.h[0].mlp.pre_identity.weight.shape == (8, 8)  # type: ignore[union-attr, index]
    with pytest.raises(ExportError, match=r"linear map in front of transformer\.h\.0\.mlp: export without path"):
        export(Intervention(model, **mlp), tokens, path=tmp_path / "model")
    assert not (tmp_path / "model").exists()
    export(Intervention(model, **c_fc), tokens, path=tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_low_precision_is_compared_with_its_own_rounding() -> None:
    target = frozen(Chain({"a": nn.Linear(8, 8), "relu": nn.ReLU(), "b": nn.Linear(8, 8)})).bfloat16()
    model, x = decomposed(target, {"a": 3, "b": 3}), drawn(16, 8).bfloat16()
    exported = export(Intervention(model, ablate={"a": [0]}), x)
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    assert exported(x).dtype == torch.bfloat16


def test_what_cannot_be_a_weight_is_refused(tmp_path: Path) -> None:
    model, x = built(), batch_of("vectors", (4,))
    for edits in ({"scale": {"first": {0: torch.ones(4)}}}, {"masks": {"first": torch.ones(4, 3)}}):
        with pytest.raises(ValueError, match="an exported weight is the same at all positions"):
            export(Intervention(model, **edits), x)
    with pytest.raises(ValueError, match="positions: an exported weight"):
        export(Intervention(model, ablate={"first": [0]}, positions=[0]), x)
    with Intervention(model), pytest.raises(RuntimeError, match="An intervention is open"):
        export(Intervention(model), x)
    assert model.current.edited is None


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    model, x = built(), batch_of("vectors", (4,))
    export(Intervention(model, ablate={"first": [0]}), x, path=tmp_path / "model")
    with pytest.raises(StorageError, match=r"holds a parity\.Chain, and `like` is a .*Linear"):
        load_exported(tmp_path / "model", like=nn.Linear(3, 2))
    with pytest.raises(StorageError, match="of other sizes"):
        load_exported(tmp_path / "model", like=Chain({"first": nn.Linear(3, 2)}))
    with pytest.raises(StorageError, match="nope holds no exported model: there is no /.*nope/metadata.json"):
        load_exported(tmp_path / "nope", like=model.target)
    tensors = tmp_path / "model" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    with pytest.raises(StorageError, match="damaged"):
        load_exported(tmp_path / "model", like=model.target)
