"""The in-house language models against transformers, with the same weights in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import seeded
from torch import Tensor, nn

from pdlightning.modules import ComponentModel, SharedMLP
from pdlightning.targets.language import GPT2Simple, LlamaSimple, LlamaSimpleMLP
from pdlightning.targets.language.blocks import LanguageModel

SHAPE = {"vocab_size": 23, "n_ctx": 12, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_mlp": 24, "seed": 0}
MODELS: dict[str, Callable[..., LanguageModel]] = {
    "llama_simple": lambda **changes: LlamaSimple(**SHAPE | {"n_kv_heads": 2} | changes),
    "llama_simple_mlp": lambda **changes: LlamaSimpleMLP(**SHAPE | changes),
    "gpt2_simple": lambda **changes: GPT2Simple(**SHAPE | {"norm": "layer"} | changes),
    "gpt2_simple_no_norm": lambda **changes: GPT2Simple(**SHAPE | {"norm": "none"} | changes),
}
every_model = pytest.mark.parametrize("name", MODELS)


def tokens(*shape: int) -> Tensor:
    return torch.randint(23, shape, generator=seeded(0))


def of_some_size(model: Any) -> Any:
    """In float64, with every weight, gain and bias drawn anew, so that a part left out would show."""
    model = model.double().eval().requires_grad_(False)
    for i, parameter in enumerate(model.parameters()):
        parameter.normal_(std=0.4, generator=seeded(i))
    return model


def float64_norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def to_llama(theirs: Any, ours: LanguageModel) -> Any:
    """Our weights in a LlamaForCausalLM, whose MLPs have our names."""
    state = {"model.embed_tokens.weight": ours.wte.weight, "model.norm.weight": ours.norm_f.weight}
    state["lm_head.weight"] = ours.wte.weight
    renamed = {"attn": "self_attn", "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "mlp": "mlp"}
    for name, weight in ours.h.state_dict().items():
        block, part, *rest = name.split(".")
        state[".".join(["model.layers", block, renamed[part], *rest])] = weight
    theirs = theirs.double().eval()
    theirs.load_state_dict(state)
    return theirs


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A LlamaForCausalLM of our shape. It computes its norms in float32 whatever it is given; here, in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    monkeypatch.setattr(LlamaRMSNorm, "forward", float64_norm)
    return lambda n_kv_heads: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=23,
            max_position_embeddings=12,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=n_kv_heads,
            intermediate_size=24,
            tie_word_embeddings=True,
        )
    )


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_llama_simple_is_llama(llama: Any, n_kv_heads: int) -> None:
    ours = of_some_size(LlamaSimple(**SHAPE, n_kv_heads=n_kv_heads))
    theirs = to_llama(llama(n_kv_heads), ours)
    torch.testing.assert_close(ours(tokens(3, 12)), theirs(tokens(3, 12)).logits, rtol=1e-10, atol=1e-10)


def test_llama_simple_mlp_is_llama_with_the_mlp_of_gpt2(llama: Any) -> None:
    from transformers.activations import NewGELUActivation

    class PlainMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_fc, self.act = nn.Linear(16, 24, bias=False), NewGELUActivation()
            self.down_proj = nn.Linear(24, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act(self.c_fc(x)))

    ours, theirs = of_some_size(LlamaSimpleMLP(**SHAPE)), llama(4)
    for layer in theirs.model.layers:
        layer.mlp = PlainMLP()
    theirs = to_llama(theirs, ours)
    torch.testing.assert_close(ours(tokens(3, 12)), theirs(tokens(3, 12)).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_gpt2_simple_is_gpt2(norm: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = of_some_size(GPT2Simple(**SHAPE, norm=norm))
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=23, n_positions=12, n_embd=16, n_layer=2, n_head=4, n_inner=24, bos_token_id=0, eos_token_id=0
        )
    ).double()
    body = theirs.transformer
    norms = [(body.ln_f, ours.norm_f)]
    body.wte.weight.data, body.wpe.weight.data = ours.wte.weight, ours.wpe.weight
    for block, mine in zip(body.h, ours.h, strict=True):
        attn = mine.attn
        block.attn.c_attn.weight.data = torch.cat([p.weight for p in (attn.q_proj, attn.k_proj, attn.v_proj)]).T
        block.attn.c_attn.bias.data = torch.cat([p.bias for p in (attn.q_proj, attn.k_proj, attn.v_proj)])
        pairs = [
            (block.attn.c_proj, attn.o_proj),
            (block.mlp.c_fc, mine.mlp.c_fc),
            (block.mlp.c_proj, mine.mlp.down_proj),
        ]
        for conv, linear in pairs:
            conv.weight.data, conv.bias.data = linear.weight.T, linear.bias
        norms += [(block.ln_1, mine.norm_1), (block.ln_2, mine.norm_2)]
    for there, here in norms:
        if norm == "layer":
            there.load_state_dict(here.state_dict())
    if norm == "none":
        body.ln_f = nn.Identity()
        for block in body.h:
            block.ln_1 = block.ln_2 = nn.Identity()
    logits = theirs.eval()(tokens(3, 12)).logits
    torch.testing.assert_close(ours(tokens(3, 12)), logits, rtol=1e-10, atol=1e-10)


@every_model
@torch.no_grad()
def test_no_position_sees_a_later_token_and_leading_axes_are_free(name: str) -> None:
    model, rows = of_some_size(MODELS[name]()), tokens(2, 3, 9)
    torch.testing.assert_close(model(rows)[1, 2], model(rows[1, 2]))
    changed = rows.clone()
    changed[..., 5] = (changed[..., 5] + 1) % 23
    same = (model(rows) - model(changed)).abs().amax((0, 1, 3)) < 1e-12
    assert same[:5].all() and not same[5:].any()


@every_model
def test_weights_are_keyed_by_the_seed(name: str) -> None:
    state = torch.get_rng_state()
    a, b, c = MODELS[name](), MODELS[name](), MODELS[name](seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    matrices = [(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True) if p.ndim == 2]
    assert matrices and not any(torch.equal(p, q) for p, q in matrices)
    drawn = [p.flatten()[:64] for p, _ in matrices]
    assert not any(torch.equal(p, q) for i, p in enumerate(drawn) for q in drawn[:i]), "each matrix has its own key"
    assert torch.equal(state, torch.get_rng_state())


@every_model
def test_the_head_is_the_embedding_at_every_moment(name: str) -> None:
    model = MODELS[name]()
    assert model.lm_head.weight is model.wte.weight
    assert [key for key in model.state_dict() if "wte" in key or "lm_head" in key] == ["wte.weight"]
    twin = copy.deepcopy(model).double()
    assert twin.lm_head.weight is twin.wte.weight and twin.wte.weight.dtype == torch.float64
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(tokens(2, 5)).square().sum().backward()
    optimizer.step()
    assert model.lm_head.weight is model.wte.weight and not torch.equal(model.wte.weight, twin.wte.weight.float())


@every_model
@torch.no_grad()
def test_every_matrix_is_a_site_and_all_masks_at_one_give_the_target(name: str) -> None:
    target = of_some_size(MODELS[name]())
    before, rows = target(tokens(3, 7)), tokens(3, 7)
    sites = {"w*": 5, "h.*_proj": 4, "lm_head": 6} | ({} if name == "llama_simple" else {"h.*.c_fc": 3})
    n_matrices = {"llama_simple": 7 * 2 + 2, "llama_simple_mlp": 6 * 2 + 2}.get(name, 6 * 2 + 3)
    model = ComponentModel(target=target, sites=sites, ci_fn=SharedMLP(hidden=[2]))
    assert len(model.components) == n_matrices
    clean = model.clean(rows)
    positions = torch.ones(3, 7, dtype=torch.float64)
    masks = {path: positions.unsqueeze(-1).expand(-1, -1, c.C) for path, c in model.components.items()}
    masked = model.masked(rows, masks, delta_masks=dict.fromkeys(masks, positions))
    torch.testing.assert_close(clean.output, before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(masked.output, before, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model.masked(rows, masks).output, before, atol=1e-2)
    assert torch.equal(model.restore()(rows), before)


@torch.no_grad()
def test_decomposing_one_use_of_the_embedding_leaves_the_other_alone() -> None:
    """Spec C7."""
    target, rows = of_some_size(MODELS["llama_simple_mlp"]()), tokens(2, 5)
    model = ComponentModel(target=target, sites={"wte": 3, "lm_head": 3}, ci_fn=SharedMLP(hidden=[2]))
    assert target.lm_head.weight is target.wte.weight
    zero = torch.zeros(2, 5, 3, dtype=torch.float64)
    clean = model.clean(rows, outputs=True)
    head = model.masked(rows, {"lm_head": zero}, outputs=True)
    assert torch.equal(head.outputs["wte"], clean.outputs["wte"]) and not head.output.any()
    assert model.masked(rows, {"wte": zero}).output.isfinite().all()
    assert not torch.equal(model.components["wte"].V.T, model.components["lm_head"].U)


@every_model
def test_what_a_model_cannot_read_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="sequence has 13 tokens.*at most 12"):
        MODELS[name]()(tokens(1, 13))
    with pytest.raises(ValueError, match="range from 3 to 23, but this model knows 0 to 22"):
        MODELS[name]()(torch.tensor([[3, 23]]))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama_simple", {"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ("llama_simple", {"n_heads": 3}, "d_model must be a multiple of n_heads 3, got 16"),
        ("llama_simple", {"n_kv_heads": 3}, "n_heads must be a multiple of n_kv_heads 3, got 4"),
        ("llama_simple_mlp", {"n_heads": 16}, "must be even for rotary positions, got 16 / 16"),
        ("gpt2_simple", {"norm": "rms"}, "norm must be layer or none, got 'rms'"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MODELS[name](**changes)
