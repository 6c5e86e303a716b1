"""Attention-pattern reconstruction: against the oracle, and against the patterns inside real attention (spec R3)."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from parity import SEED, STEP, assert_same, assert_same_value_and_gradients, batch_of, built, observed, oracle_of
from torch import Tensor, nn

from pdlightning.functional.attention import attention_scores, split_heads
from pdlightning.masking import AllSites, Constant, EachSite, Source, Uniform
from pdlightning.metrics import AttentionPatternKL, PGDLadder, ReconstructionLoss
from pdlightning.modules import ComponentModel, SharedMLP
from pdlightning.targets import InductionTransformer
from pdlightning.targets.language.llama_simple import LlamaSimple

pytestmark = pytest.mark.usefixtures("float64")


def recon(source: Source, **settings: Any) -> ReconstructionLoss:
    """In the chain of tokens, `embed` stands for the queries and `out`, as wide, for the keys."""
    comparison = AttentionPatternKL(q="embed", k="out", **{"rope_base": None, **settings})
    loss = ReconstructionLoss(coeff=1.0, source=source, routing=AllSites(), comparison=comparison)
    loss.term = "term"
    return loss


@pytest.mark.parametrize("kind", ["uniform", "constant"])
@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_reconstruction_of_patterns_equals_the_oracle(kind: str, n_heads: int, causal: bool) -> None:
    model, batch = built("tokens"), batch_of("tokens", (2, 4))
    target, ci_fn = oracle_of(model)
    loss = recon(Uniform() if kind == "uniform" else Constant(value=0.0), n_heads=n_heads, causal=causal)
    loss.prepare(model)
    total, count = loss.measure(observed(model, batch))
    clean = naive.clean_forward(target, batch)
    lower, _ = naive.causal_importances(naive.ci_logits(ci_fn, target["sites"], clean["inputs"]))
    draws = naive.Draws(SEED, STEP, (0, 1), (4,))
    sources, deltas = naive.draw_sources(draws, target["sites"], "term", kind)
    masked = naive.forward(target, batch, naive.masks_from_sources(lower, sources), deltas)["outputs"]
    settings = {"n_heads": n_heads, "n_kv_heads": n_heads, "rope_base": None, "causal": causal}
    expected = naive.attention_kl(
        (clean["outputs"]["embed"], clean["outputs"]["out"]),
        (masked["embed"], masked["out"]),
        {**settings, "scale": (2 / n_heads) ** -0.5},
    )
    assert count == expected[1] == 2 * n_heads * 4
    assert_same_value_and_gradients(model, total / count, naive.value(expected), target, ci_fn)


def induction() -> InductionTransformer:
    return InductionTransformer(vocab=11, length=8, d_model=8, n_layers=2, n_heads=2, seed=0).requires_grad_(False)


def decomposed(target: nn.Module, **sites: int) -> ComponentModel:
    return ComponentModel(target=target.double().requires_grad_(False), sites=sites, ci_fn=SharedMLP(hidden=[3]))


def tokens(*shape: int) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(0))


def patterns(model: ComponentModel, comparison: AttentionPatternKL, batch: Any) -> list[Tensor]:
    """What the comparison takes for the clean attention probabilities, layer by layer."""
    comparison.prepare(model)
    outputs = model.clean(batch, outputs=True).outputs
    found = []
    for sites in comparison.layers:
        q, k = comparison.by_head([outputs[site] for site in sites])
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
        found.append(attention_scores(q, k, scale=q.shape[-1] ** -0.5, causal=True).softmax(-1))
    return found


def test_the_pattern_is_that_of_the_induction_transformer() -> None:
    target, batch = induction().double(), tokens(3, 8)
    expected = target.attention_patterns(batch)
    model = decomposed(target, **{"layers.*.attn.[qk]_proj": 2})
    found = patterns(model, AttentionPatternKL(n_heads=2, rope_base=None, q="*q_proj", k="*k_proj"), batch)
    assert len(found) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


@torch.no_grad()
def test_the_pattern_is_that_of_gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=11, n_positions=16, n_embd=12, n_layer=2, n_head=3, attn_implementation="eager")
    target = GPT2LMHeadModel(config).double().eval()
    batch = tokens(2, 9)
    expected = target(batch, output_attentions=True).attentions
    comparison = AttentionPatternKL(n_heads=3, rope_base=None, qkv="transformer.h.*.attn.c_attn")
    found = patterns(decomposed(target, **{"*.c_attn": 2}), comparison, batch)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def huggingface_llama(attention: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, initializer_range=0.3, attn_implementation=attention,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def llama_patterns() -> AttentionPatternKL:
    return AttentionPatternKL(n_heads=4, n_kv_heads=2, rope_base=100.0, q="*.q_proj", k="*.k_proj")


@torch.no_grad()
def test_the_pattern_is_that_of_llama_with_fewer_heads_of_keys() -> None:
    target, batch = huggingface_llama("eager"), tokens(2, 9)
    expected = target(batch, output_attentions=True).attentions
    found = patterns(decomposed(target, **{"*.[qk]_proj": 2}), llama_patterns(), batch)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # its softmax is float32
        assert theirs.diff(dim=-1).abs().max() > 0.5, "a pattern worth comparing"


@torch.no_grad()
@pytest.mark.parametrize("ours", [True, False])
def test_the_pattern_mixes_the_values_as_llama_does(ours: bool) -> None:
    target = huggingface_llama("sdpa")
    if ours:
        target = LlamaSimple(
            vocab_size=11, n_ctx=16, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_mlp=8, rope_base=100.0, seed=0
        )
        for parameter in target.parameters():
            parameter.mul_(10)
    model, batch = decomposed(target, **{"*.[qkvo]_proj": 2}), tokens(2, 9)
    found, run = patterns(model, llama_patterns(), batch), model.clean(batch, outputs=True)
    values = [split_heads(x, 2).repeat_interleave(2, dim=-3) for s, x in run.outputs.items() if s.endswith("v_proj")]
    mixed = [x for s, x in run.inputs.items() if s.endswith("o_proj")]
    for pattern, v, expected in zip(found, values, mixed, strict=True):
        assert_same((pattern @ v).transpose(-3, -2).flatten(-2), expected)


def test_layers_and_routes_add_values_and_counts() -> None:
    model = decomposed(induction(), **{"layers.*.attn.[qk]_proj": 2})
    comparison = AttentionPatternKL(n_heads=2, rope_base=None, q="*q_proj", k="*k_proj")
    for routing, forwards in ((AllSites(), 1), (EachSite(), 4)):
        loss = ReconstructionLoss(coeff=1.0, source=Uniform(), routing=routing, comparison=comparison)
        loss.prepare(model)
        assert loss.measure(observed(model, tokens(3, 8)))[1] == forwards * 2 * 3 * 2 * 8
    first, second = (
        AttentionPatternKL(n_heads=2, rope_base=None, q=f"*.{i}.*q_proj", k=f"*.{i}.*k_proj") for i in (0, 1)
    )
    observation = observed(model, tokens(3, 8))
    masked = model.masked(observation.batch, observation.ci.lower, outputs=True)
    for each in (comparison, first, second):
        each.prepare(model)
    whole, parts = comparison(observation.clean, masked), [c(observation.clean, masked) for c in (first, second)]
    assert_same(whole[0], parts[0][0] + parts[1][0])


def test_parts_of_a_batch_give_the_value_of_the_whole() -> None:
    model, batch = built("tokens"), batch_of("tokens", (5, 3))
    whole, parts = recon(Uniform(), n_heads=1), recon(Uniform(), n_heads=1)
    whole.prepare(model)
    parts.prepare(model)
    whole.update(observed(model, batch))
    parts.update(observed(model, batch[:2]))
    parts.update(observed(model, batch[2:], first=2))
    assert_same(parts.compute(), whole.compute())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"q": "*q_proj"}, "expected q and k, or qkv alone, got q='.q_proj', k=None, qkv=None"),
        ({}, "q=None, k=None, qkv=None"),
        ({"q": "*q_proj", "k": "*k_proj", "qkv": "*"}, "q and k, or qkv alone"),
        ({"q": "*q_proj", "k": "*k_proj", "n_kv_heads": 3}, "n_heads must be a multiple of n_kv_heads, got 2 and 3"),
        ({"q": "*q_proj", "k": "*k_proj", "n_kv_heads": 1}, r"q_proj' \(8 wide\), .*k_proj' \(8 wide\) do not split"),
        ({"q": "*q_proj", "k": "*k_proj", "n_heads": 3}, "n_heads=3 and n_kv_heads=3 .* heads of one width"),
        ({"q": "*q_proj", "k": "*k_proj", "n_heads": 8, "rope_base": 1e4}, "heads of one even width"),
        ({"qkv": "*v_proj"}, r"layers.0.attn.v_proj' \(8 wide\) do not split"),
        ({"q": "*q_proj", "k": "*.key"}, "Pattern '..key' matches no site. The sites: layers.0.attn.q_proj"),
        ({"q": "*q_proj", "k": "*.0.*k_proj"}, "q matches layers.0.*layers.1.*; k matches layers.0.attn.k_proj"),
        ({"q": "*.1.*q_proj", "k": "*.0.*k_proj"}, "whose paths differ in one part"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_run(settings: dict[str, Any], said: str) -> None:
    model = decomposed(induction(), **{"layers.*.attn.[qkv]_proj": 2})
    with pytest.raises(ValueError, match=said):
        comparison = AttentionPatternKL(**{"n_heads": 2, "rope_base": None, **settings})
        ReconstructionLoss(coeff=1.0, source=Uniform(), routing=AllSites(), comparison=comparison).prepare(model)


def test_a_site_that_is_not_decomposed_and_a_batch_without_sequences_are_refused() -> None:
    comparison = AttentionPatternKL(n_heads=2, rope_base=None, q="*q_proj", k="*k_proj")
    with pytest.raises(ValueError, match="'.k_proj' matches no site"):
        comparison.prepare(decomposed(induction(), **{"layers.*.attn.q_proj": 2}))
    with pytest.raises(RuntimeError, match="call prepare"):
        run = decomposed(induction(), **{"*.q_proj": 2}).clean(tokens(2, 3))
        comparison(run, run)
    model = built("tokens")
    ladder = PGDLadder(rungs=[1], step_size=0.1, comparison=recon(Uniform(), n_heads=1).comparison)
    ladder.prepare(model)
    with pytest.raises(ValueError, match=r"needs sequences: .* site 'embed', got \(3, 2\)"):
        ladder.check(observed(model, batch_of("tokens", (3,))))
