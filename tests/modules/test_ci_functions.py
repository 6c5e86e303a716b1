"""Causal importances against the oracle: every function, depth and squashing (spec 3)."""

from __future__ import annotations

import math

import naive
import pytest
import torch
from parity import (
    CI_FUNCTIONS,
    SEED,
    SQUASHINGS,
    STEP,
    assert_same,
    assert_same_value_and_gradients,
    batch_of,
    built,
    observed,
    oracle_of,
)
from torch import Tensor

from pdlightning.functional import KeyedRandom
from pdlightning.modules import CIFunction, CIShape, GlobalMLP, SharedMLP


def mixed(ci: dict[str, Tensor]) -> Tensor:
    """One number that sees every entry with its own weight, of both signs."""
    return torch.stack([(x * torch.cos(torch.arange(x.numel()).reshape(x.shape))).sum() for x in ci.values()]).sum()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("ci", list(CI_FUNCTIONS))
@pytest.mark.parametrize("hidden", [[3], [3, 2]], ids=["depth1", "depth2"])
@pytest.mark.parametrize("data", ["vectors", "tokens"])
@pytest.mark.parametrize("leading", [(3,), (2, 2)])
def test_logits_and_their_gradients_equal_the_oracle(
    ci: str, hidden: list[int], data: str, leading: tuple[int, ...]
) -> None:
    model, batch = built(data, ci=ci, hidden=hidden), batch_of(data, leading)
    target, ci_fn = oracle_of(model)
    ours = model.causal_importances(model.clean(batch)).logits
    theirs = naive.ci_logits(ci_fn, target["sites"], naive.clean_forward(target, batch)["inputs"])
    assert list(ours) == list(theirs)
    for site in ours:
        assert_same(ours[site], theirs[site], site)
    assert_same_value_and_gradients(model, mixed(ours), mixed(theirs), target, ci_fn)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("ci", list(CI_FUNCTIONS))
@pytest.mark.parametrize("squash", list(SQUASHINGS))
@pytest.mark.parametrize("noisy", [False, True])
def test_importances_and_their_gradients_equal_the_oracle(ci: str, squash: str, noisy: bool) -> None:
    model, batch = built(ci=ci, squash=squash), batch_of("vectors", (6,))  # type: ignore[arg-type]
    target, ci_fn = oracle_of(model)
    observation = observed(model, batch)
    logits = naive.ci_logits(ci_fn, target["sites"], naive.clean_forward(target, batch)["inputs"])
    noise = naive.draw_ci_noise(naive.Draws(SEED, STEP, tuple(range(6))), target["sites"]) if noisy else None
    lower, upper = naive.causal_importances(logits, noise=noise, **SQUASHINGS[squash])  # type: ignore[index]
    ours = observation.noisy_lower if noisy else observation.ci.lower
    for site in lower:
        assert_same(ours[site], lower[site], site)
        assert_same(observation.ci.upper[site], upper[site], site)
    value, expected = mixed(ours) + mixed(observation.ci.upper), mixed(lower) + mixed(upper)
    assert_same_value_and_gradients(model, value, expected, target, ci_fn)


@pytest.mark.parametrize("ci", list(CI_FUNCTIONS))
def test_initial_weights_are_kaiming_normal_and_the_last_layer_is_linear(ci: str) -> None:
    ci_fn: CIFunction = CI_FUNCTIONS[ci](hidden=[40, 30])
    ci_fn.build({"a": CIShape(20, 50), "b": CIShape(20, 50)}, seed=0)
    fan_in = {"scalar_mlp": 1, "vector_mlp": 20, "shared_mlp": 20, "global_mlp": 40}[ci]
    weights = [(name, parameter) for name, parameter in ci_fn.named_parameters() if "weights" in name]
    assert len(weights) == (3 if ci == "global_mlp" else 6)
    for (name, parameter), fan, gain in zip(weights, [fan_in, 40, 30] * 2, [2, 2, 1] * 2, strict=False):
        z = parameter.detach() * math.sqrt(fan / gain)
        assert abs(float(z.mean())) < 4 / math.sqrt(z.numel()), name
        assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / z.numel()), name
    assert all(bool((p == 0).all()) for n, p in ci_fn.named_parameters() if "bias" in n)


def test_initial_networks_of_two_sites_differ_and_repeat() -> None:
    first, again = SharedMLP(hidden=[4]), SharedMLP(hidden=[4])
    for ci_fn in (first, again):
        ci_fn.build({"a": CIShape(3, 2), "b": CIShape(3, 2)}, seed=0)
    a, b = (network.weights[0] for network in first.networks.values())  # type: ignore[union-attr, index]
    assert not torch.equal(a, b)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))


def test_each_subcomponent_of_a_scalar_mlp_reads_its_own_activation_alone() -> None:
    model = built(ci="scalar_mlp").float()
    network = model.ci_fn.networks["first"]  # type: ignore[union-attr, index]
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    moved = x.clone()
    moved[:, 1] += 1
    before, after = network(x), network(moved)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]]) and not torch.equal(before[:, 1], after[:, 1])


def test_the_noise_of_the_lower_branch_is_at_most_a_twentieth() -> None:
    model = built().float()
    samples, now = torch.arange(64, dtype=torch.int32), torch.tensor(0, dtype=torch.int32)
    ci = model.causal_importances(model.clean(batch_of("vectors", (64,)).float()))
    noisy = model.noisy_lower(ci, KeyedRandom.at(seed=0, step=now, samples=samples))
    for site, logits in ci.logits.items():
        inside = (logits > 0.06) & (logits < 0.9)
        shift = (1.05 * logits - noisy[site])[inside]
        assert shift.min() >= 0 and shift.max() <= 0.05 + 1e-6 and shift.std() > 0.01


def test_a_missing_or_impossible_hidden_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SharedMLP\(hidden=...\): every hidden width must be >= 1, got \[4, 0\]"):
        SharedMLP(hidden=[4, 0])
    with pytest.raises(ValueError, match=r"GlobalMLP"):
        GlobalMLP(hidden=[-1])
