"""The ci functions for sequences: start, size, RoPE, norm, checkpointing, compilation, precision, errors (spec I2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from parity import assert_same, seeded
from sequence_parity import CAUSAL, GROUPS, RECIPES, SHAPES, Recipe, alone, inputs_of, mixed, small
from torch import Tensor

from pdlightning.modules import ChunkwiseTransformer, CIFunction, CIShape, GlobalTransformer, ReverseResidual
from pdlightning.modules.sequence_blocks import AttentionSettings, Block, SelfAttention, rms_norm


@pytest.mark.parametrize("kind", list(RECIPES))
def test_layers_before_a_gelu_start_with_the_gain_of_relu_and_others_with_that_of_a_linear_map(kind: str) -> None:
    ci_fn = RECIPES[kind]()
    wide = {"d_model": 48, "mlp_hidden": [40, 44], "transition_hidden": [40, 44]}
    for name, value in wide.items():
        if getattr(ci_fn, name, None) is not None:
            setattr(ci_fn, name, value)
    ci_fn.build({site: CIShape(50, 60) for site, _, _ in SHAPES}, seed=0)
    weights = [(name, p.detach()) for name, p in ci_fn.named_parameters() if ".weights." in name]
    for name, weight in weights:
        gain = 2 if "mlp" in name and not name.endswith("weights.2") else 1
        z = weight * math.sqrt(weight.shape[1] / gain)
        assert abs(float(z.mean())) < 4.5 / math.sqrt(z.numel()), name
        assert abs(float(z.var()) - 1) < 4.5 * math.sqrt(2 / z.numel()), name
    assert all(bool((p == 0).all()) for n, p in ci_fn.named_parameters() if ".biases." in n)
    flat = [w.flatten()[:100] for _, w in weights]
    assert all(not torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])  # no two share a key


def test_initial_weights_repeat_and_do_not_depend_on_the_order_of_groups() -> None:
    shapes = {site: CIShape(d, C) for site, d, C in SHAPES}
    first = ChunkwiseTransformer(groups=GROUPS, **small())
    again = ChunkwiseTransformer(groups=dict(reversed(GROUPS.items())), **small())
    for ci_fn in (first, again):
        ci_fn.build(shapes, seed=4)
    for (name, p), (other, q) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q)


def size_of(*, d_in: int, d: int, C: int, n_blocks: int = 1, attention: bool = True, hidden: Sequence[int] = ()) -> int:
    widths = [d, *hidden, d] if hidden else []
    mlp = sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False))
    return (d_in + 1) * d + n_blocks * (4 * (d + 1) * d * attention + mlp) + (d + 1) * C


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("global", size_of(d_in=13, d=8, C=13, n_blocks=2, hidden=[5])),
        (
            "chunkwise",
            size_of(d_in=11, d=8, C=10, n_blocks=2, hidden=[5]) + size_of(d_in=2, d=8, C=3, n_blocks=2, hidden=[5]),
        ),
        ("reverse", size_of(d_in=11, d=3, C=10, attention=False) + size_of(d_in=2, d=3, C=3, attention=False)),
        ("reverse both", size_of(d_in=11, d=4, C=10, hidden=[4, 2]) + size_of(d_in=2, d=4, C=3, hidden=[4, 2])),
    ],
)
def test_number_of_parameters(kind: str, expected: int) -> None:
    assert sum(p.numel() for p in alone(kind).parameters()) == expected


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["global", "chunkwise taps", "reverse both"])
def test_checkpointed_activations_change_no_bit_of_a_gradient(kind: str) -> None:
    ci_fn, inputs = alone(kind), {site: x.requires_grad_() for site, x in inputs_of(2, 3).items()}
    runs, calls = [], []
    for module in ci_fn.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    n = sum(isinstance(module, Block) for module in ci_fn.modules())
    before = torch.random.get_rng_state()
    for checkpointed in (False, True):
        for module in ci_fn.modules():
            if isinstance(module, Block):
                module.checkpoint_activations = checkpointed
        value = mixed(ci_fn(inputs))
        runs.append([value, *torch.autograd.grad(value, [*inputs.values(), *ci_fn.parameters()])])
    assert len(calls) == 3 * n  # once, and then once more in the backward
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.equal(before, torch.random.get_rng_state())


def test_checkpointed_blocks_keep_no_copies_of_weights_until_the_end_of_autocast() -> None:
    ci_fn, inputs, runs = alone("global"), {site: x.requires_grad_() for site, x in inputs_of(2, 3).items()}, []
    kept: list[bool] = []
    for module in ci_fn.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_pre_hook(lambda *_: kept.append(torch.is_autocast_cache_enabled()))
    for checkpointed in (False, True):
        for module in ci_fn.modules():
            if isinstance(module, Block):
                module.checkpoint_activations = checkpointed
        with torch.autocast("cpu", torch.bfloat16):
            value = mixed(ci_fn(inputs))
            assert torch.is_autocast_cache_enabled()
        runs.append([value, *torch.autograd.grad(value, [*inputs.values(), *ci_fn.parameters()])])
    n = len(kept) // 3
    assert kept == [True] * n + [False] * 2 * n
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "ci_fn",
    [
        GlobalTransformer(**small(), checkpoint_activations=True),
        ChunkwiseTransformer(**small(), groups=2, checkpoint_activations=True),
        ReverseResidual(groups=2, d_model=4, transition_hidden=[3], checkpoint_activations=True),
    ],
)
def test_the_setting_reaches_every_block(ci_fn: CIFunction) -> None:
    ci_fn.build({site: CIShape(d, C) for site, d, C in SHAPES}, seed=0)
    assert all(m.checkpoint_activations for m in ci_fn.modules() if isinstance(m, Block))


@pytest.mark.parametrize("kind", ["global causal", "chunkwise taps", "reverse both"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiles_to_one_graph(kind: str, checkpointed: bool) -> None:
    ci_fn, inputs = alone(kind), inputs_of(2, 3)
    for module in ci_fn.modules():
        if isinstance(module, Block):
            module.checkpoint_activations = checkpointed
    eager = mixed(ci_fn(inputs))
    compiled = mixed(torch.compile(ci_fn, fullgraph=True, backend="aot_eager")(inputs))
    torch.testing.assert_close(compiled, eager)
    pairs = [torch.autograd.grad(value, list(ci_fn.parameters())) for value in (compiled, eager)]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["global", "chunkwise taps", "reverse both"])
def test_autocast_gives_logits_of_its_type_near_those_without_it(kind: str) -> None:
    ci_fn, inputs = alone(kind), inputs_of(2, 3)
    plain = ci_fn(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ci_fn(inputs)
    for site in plain:
        assert plain[site].dtype == torch.float32 and cast[site].dtype == torch.bfloat16
        scale = float(plain[site].detach().abs().max())
        torch.testing.assert_close(cast[site].float(), plain[site], rtol=0.0, atol=0.05 * scale)
    mixed(cast).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ci_fn.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_rounds_once(dtype: torch.dtype) -> None:
    x = (1000 * torch.randn(20, 300, generator=seeded(0))).to(dtype)  # its squares are too large for float16
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert rms_norm(x).dtype == dtype
    torch.testing.assert_close(rms_norm(x).double(), exact, rtol=torch.finfo(dtype).eps, atol=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(rms_norm(x).double(), exact, rtol=torch.finfo(dtype).eps, atol=0.0)
    assert rms_norm(torch.zeros(3, dtype=dtype)).tolist() == [0.0] * 3


@pytest.mark.parametrize("kind", ["global", "chunkwise", "reverse both"])
def test_long_sequences_have_no_limit(kind: str) -> None:
    logits = alone(kind)(inputs_of(2, 512))
    mixed(logits).backward()
    assert all(x.shape[:2] == (2, 512) and bool(x.isfinite().all()) for x in logits.values())


def turned(x: Tensor) -> Tensor:
    settings = AttentionSettings(n_heads=1, direction="causal", rope_base=10_000.0)
    return SelfAttention(d_model=8, settings=settings, seed=0, name="attention").turned(x[None, None])[0, 0]


def test_turned_queries_and_keys_know_their_distance_alone() -> None:
    q, k = torch.randn(8, dtype=torch.float64, generator=seeded(0)), torch.randn(8, generator=seeded(1)).double()
    at = [turned(x.expand(520, 8)) for x in (q, k)]
    products = at[0] @ at[1].T
    assert_same(products[3:, 3:], products[:-3, :-3])
    assert_same(products.diagonal(), torch.dot(q, k).expand(520))
    assert products[0].std() > 0.1


def test_a_bfloat16_query_is_turned_by_exact_angles_and_rounded_once() -> None:
    x = torch.randn(520, 8, generator=seeded(0)).bfloat16()
    torch.testing.assert_close(turned(x).double(), turned(x.double()), rtol=2**-8, atol=2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GlobalTransformer(**small(n_blocks=0)), "GlobalTransformer: n_blocks must be at least 1, got 0"),
        (lambda: GlobalTransformer(**small(n_heads=0)), "n_heads must be at least 1, got 0"),
        (lambda: GlobalTransformer(**small(d_model=6)), r"d_model must be a multiple of 2 \* n_heads = 4, got 6"),
        (lambda: GlobalTransformer(**small(mlp_hidden=[])), r"needs hidden widths >= 1, got \[\]"),
        (lambda: GlobalTransformer(**small(), rope_base=0.0), "rope_base must be positive, got 0.0"),
        (lambda: GlobalTransformer(**small(), attention="both"), "'bidirectional' or 'causal', got 'both'"),  # type: ignore[arg-type]
        (lambda: ChunkwiseTransformer(groups=0, **small()), "ChunkwiseTransformer: groups must be a number >= 1"),
        (
            lambda: ChunkwiseTransformer(groups=1, taps={"group_0": []}, **small()),
            r"taps\['group_0'\]: expected a list",
        ),
        (lambda: ReverseResidual(groups={}, d_model=2), "ReverseResidual: groups is empty"),
        (lambda: ReverseResidual(groups={"a": "*"}, d_model=2), r"groups\['a'\]: expected a list .*, got '\*'"),  # type: ignore[dict-item]
        (lambda: ReverseResidual(groups=1, d_model=0), "ReverseResidual: d_model must be at least 1, got 0"),
        (lambda: ReverseResidual(groups=1, d_model=3, attention=CAUSAL), r"multiple of 2 \* n_heads = 2, got 3"),
        (lambda: ReverseResidual(groups=1, d_model=2, transition_hidden=[0]), r"hidden widths >= 1, got \[0\]"),
    ],
)
def test_impossible_settings_are_refused(make: Recipe, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_with_different_leading_axes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"same leading axes, got \{'embed': \(1, 3\), 'conv.pre_identity': \(2, 3\)"):
        alone("global")(inputs_of(2, 3) | {"embed": torch.zeros(1, 3, 3)})
