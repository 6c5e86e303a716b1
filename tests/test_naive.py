"""The oracle against hand-computed numbers, finite differences and torch's own primitives."""

from __future__ import annotations

import math
from typing import Any

import naive
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def two_layer_target(kind: str = "linear") -> naive.Target:
    """3 -> 4 -> 2 with C 5 and 3 and a bias on the second site."""
    weight = normal(4, 3) if kind == "linear" else normal(3, 4)
    first = naive.make_site(kind, weight, None, normal(3, 5, seed=1), normal(5, 4, seed=2) * 0.4)
    bias = torch.tensor([0.3, -0.2])
    second = naive.make_site("linear", normal(2, 4, seed=3), bias, normal(4, 3, seed=4), normal(3, 2, seed=5))
    return {"sites": {"first": first, "second": second}, "layers": ["first", "relu", "second"]}


def ci_network(kind: str, hidden: list[int], target: naive.Target | None = None) -> naive.CiFn:
    sites = (target or two_layer_target())["sites"]
    return naive.init_ci_fn(kind, sites, hidden, torch.Generator().manual_seed(0))


def recon(source: str, *, routing: str = "all", comparison: str = "mse", **fields: Any) -> naive.Config:
    term = {"kind": "reconstruction", "coeff": 1.0, "delta": True, **fields}
    return {**term, "source": source, "routing": routing, "comparison": comparison}


def config(**fields: Any) -> naive.Config:
    importance = {"phi": "lp", "p": 1.5, "beta": 0.5, "reference_count": None}
    terms = {
        "faithfulness": {"kind": "faithfulness", "coeff": 2.0, "form": "mean_squared"},
        "importance_minimality": {"kind": "importance_minimality", "coeff": 0.1, **importance},
        "stochastic_recon": recon("uniform"),
        "subset": recon("binomial", routing="uniform_subset", comparison="kl"),
        "layerwise": recon("uniform", routing="each_site", comparison="hidden"),
    }
    squashings = {"lower": "lower_leaky_hard", "upper": "upper_leaky_hard", "sampling": "continuous"}
    rates = {"lr_components": 1e-2, "lr_ci": 2e-2, "clip_components": 0.5, "clip_ci": None, "faithfulness_warmup": None}
    return {"seed": 3, "steps": 4, "terms": terms, **squashings, **rates, **fields}


def test_one_subcomponent_by_hand() -> None:
    # V U maps x = 3 to (6, 12); W maps it to (9, 3), so D maps it to (3, -9).
    V, U = torch.tensor([[2.0]]), torch.tensor([[1.0, 2.0]])
    site = naive.make_site("linear", torch.tensor([[3.0], [1.0]]), torch.tensor([10.0, 20.0]), V, U)
    x, mask = torch.tensor([3.0]).double(), torch.tensor([0.5])
    assert naive.component_forward(site, x, mask).tolist() == [13.0, 26.0]
    assert naive.component_forward(site, x, mask, torch.tensor(1 / 3).double()).tolist() == pytest.approx([14.0, 23.0])
    assert naive.component_forward(site, x, mask, routed=False).tolist() == [19.0, 23.0]


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "identity"])
def test_both_identities_of_the_masked_output_agree(kind: str) -> None:
    in_out = torch.eye(4).double() if kind == "identity" else normal(4, 3)
    d_in, d_out = in_out.shape
    weight = {"linear": in_out.T, "conv1d": in_out, "embedding": in_out, "identity": None}[kind]
    bias = normal(d_out, seed=9) if kind in ("linear", "conv1d") else None
    site = naive.make_site(kind, weight, bias, normal(d_in, 6, seed=1), normal(6, d_out, seed=2))
    x = torch.tensor(2) if kind == "embedding" else normal(d_in, seed=3)
    mask, delta = naive.Draws(0, 0, (0,)).uniform(6, "mask")[0], torch.tensor(0.3).double()
    direct = naive.component_forward(site, x, mask, delta)
    torch.testing.assert_close(direct, naive.component_forward_without_delta_matrix(site, x, mask, delta))
    dense = torch.eye(d_in).double()[2] if kind == "embedding" else x
    by_matrix = dense @ ((site["V"] * mask) @ site["U"] + 0.3 * (in_out - site["V"] @ site["U"]))
    torch.testing.assert_close(direct, by_matrix if bias is None else by_matrix + bias)


@pytest.mark.parametrize(
    ("x", "g", "lower", "passed"),
    [(-2.0, -3.0, 0.0, -0.03), (-2.0, 3.0, 0.0, 0.0), (0.0, -3.0, 0.0, -0.03), (0.5, 3.0, 0.5, 3.0)]
    + [(0.5, -3.0, 0.5, -3.0), (1.0, 3.0, 1.0, 3.0), (2.0, 3.0, 1.0, 0.0), (2.0, -3.0, 1.0, 0.0)],
)
def test_lower_squashing_and_its_backward(x: float, g: float, lower: float, passed: float) -> None:
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = naive.lower_leaky_hard(leaf)
    (grad,) = torch.autograd.grad(y, leaf, torch.tensor(g).double())
    assert (y.item(), grad.item()) == pytest.approx((lower, passed))


def test_squashings_at_minus_two_a_half_and_three() -> None:
    x = torch.tensor([-2.0, 0.5, 3.0]).double()
    expected = {"upper_leaky_hard": [0.0, 0.5, 1.02], "leaky_hard": [-0.02, 0.5, 1.02], "hard": [0.0, 0.5, 1.0]}
    expected |= {"sigmoid": [0.11920292, 0.62245933, 0.95257413], "swish_hard": [0.0, 0.31122967, 1.0]}
    for kind, y in expected.items():
        assert naive.squash(kind, x).tolist() == pytest.approx(y, abs=1e-7), kind


@pytest.mark.parametrize("kind", ["scalar_mlp", "vector_mlp", "shared_mlp"])
def test_ci_functions_equal_their_batched_form(kind: str) -> None:
    target, ci_fn = two_layer_target(), ci_network(kind, [4, 3])
    h = normal(2, 2, 3)
    x = {"first": h, "second": normal(2, 2, 4)}
    if kind == "scalar_mlp":
        h = (h @ target["sites"]["first"]["V"])[..., None]
    elif kind == "vector_mlp":
        h = h[..., None, :].expand(2, 2, 5, 3)
    for depth, (weight, bias) in enumerate(ci_fn["sites"]["first"]):
        equation = "...i,oi->...o" if kind == "shared_mlp" else "...ci,coi->...co"
        h = torch.einsum(equation, h, weight) + bias
        h = F.gelu(h) if depth < 2 else h
    logits = naive.ci_logits(ci_fn, target["sites"], x)["first"]
    torch.testing.assert_close(logits, h if kind == "shared_mlp" else h[..., 0])


def test_draws_and_masks_follow_their_key_and_kind() -> None:
    drawn = naive.Draws(3, 17, (42,), (2,)).uniform(2, "stochastic_recon", "linear1", "source")
    assert drawn[0, 1].tolist() == [0.3441823124885559, 0.20173615217208862]
    sites, draws = two_layer_target()["sites"], naive.Draws(0, 0, (0, 1, 2), (2,))
    uniform, delta = naive.draw_sources(draws, sites, "t", "uniform")
    binomial, binomial_delta = naive.draw_sources(naive.Draws(0, 0, (1, 2), (2,)), sites, "t", "binomial")
    assert torch.equal(binomial["first"], (uniform["first"][1:] >= 0.5).double())
    assert torch.equal(binomial_delta["first"], delta["first"][1:])
    masks = naive.masks_from_sources({"s": torch.tensor([[0.25, 1.0]])}, {"s": torch.tensor([[0.5, 0.5]])})
    assert masks["s"].tolist() == [[0.625, 1.0]]
    logits, noise = {"s": torch.tensor([[0.5]]).double()}, {"s": torch.tensor([[1.0]]).double()}
    lower, upper = naive.causal_importances(logits, noise=noise)
    assert (lower["s"].item(), upper["s"].item()) == pytest.approx((0.475, 0.5))


def test_subset_sizes_are_uniform_and_ties_go_to_the_earlier_site() -> None:
    assert naive.subset_routes(2, [0.5, 0.1, 0.5]) == [True, True, False]
    routes = naive.draw_routes(naive.Draws(0, 0, tuple(range(600))), "abc", "t", "uniform_subset")
    stacked = torch.stack(list(routes.values())).double()
    sizes = [(stacked.sum(0) == k).sum().item() for k in range(4)]
    assert sizes[0] == 0 and all(150 < n < 250 for n in sizes[1:]) and (stacked.mean(1) - 2 / 3).abs().max() < 0.06


def test_comparisons_divide_by_elements_and_positions() -> None:
    clean, masked = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    torch.testing.assert_close(naive.value(naive.mse(clean, masked)), F.mse_loss(masked, clean))
    reference = F.kl_div(masked.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="sum")
    torch.testing.assert_close(naive.value(naive.kl(clean, masked)), reference / 6)


def test_each_site_leaves_the_other_sites_to_the_target() -> None:
    target, batch = two_layer_target(), normal(2, 3)
    ci = {"first": torch.ones(2, 5).double(), "second": torch.zeros(2, 3).double()}
    zeros = {s: torch.zeros_like(g) for s, g in ci.items()}
    total, count = naive.reconstruction(target, batch, ci, zeros, {}, "each_site", "mse")
    first, second = target["sites"].values()
    clean = F.relu(batch @ first["W"].T) @ second["W"].T
    only_first = F.relu(batch @ first["V"] @ first["U"]) @ second["W"].T
    torch.testing.assert_close(total, (only_first - clean).pow(2).sum() + clean.pow(2).sum())
    assert count == 2 * clean.numel()
    ones, whole = {s: torch.ones_like(g) for s, g in ci.items()}, {s: torch.ones(2).double() for s in ci}
    assert naive.reconstruction(target, batch, ci, ones, whole, "each_site", "mse")[0].item() < 1e-20


def test_faithfulness_by_hand() -> None:
    # D of the first site is (1, 2) (square 5, W square 20), of the second 3 (square 9, W square 9).
    first = naive.make_site("linear", torch.tensor([[2.0], [4.0]]), None, torch.ones(1, 1), torch.tensor([[1.0, 2.0]]))
    second = naive.make_site("linear", torch.tensor([[3.0]]), None, torch.zeros(1, 2), torch.ones(2, 1))
    losses = [naive.faithfulness({"first": first, "second": second}, form) for form in ("mean_squared", "relative")]
    assert [naive.value(pair).item() for pair in losses] == pytest.approx([14 / 3, (5 / 20 + 1) / 2])


def test_importance_minimality_by_hand() -> None:
    upper = {"a": torch.tensor([[1.0], [0.5]]).double(), "b": torch.tensor([[0.0], [0.0]]).double()}

    def loss(phi: Any = lambda u: naive.lp(u, p=2.0), **options: Any) -> float:
        return naive.value(naive.importance_minimality(upper, phi, **options)).item()

    f = (1 + 0.25) / 2
    assert loss() == pytest.approx(f)
    assert loss(beta=0.5) == pytest.approx(f + 0.5 * f * math.log2(1 + 2 * f))
    assert loss(beta=0.5, reference_count=4) == pytest.approx(f + 0.5 * f * math.log2(1 + 4 * f))
    assert loss(lambda u: naive.smooth_l0(u, gamma=0.5)) == pytest.approx((1 / 1.25 + 0.5) / 2)
    assert loss(lambda u: naive.smooth_l0(u, gamma=0.5, scaled=True)) == pytest.approx((1 + 0.625) / 2)


@pytest.mark.parametrize("scope", ["per_position", "shared"])
@pytest.mark.parametrize("leading", [(3,), (2, 2)])
def test_pgd_climbs_to_the_bounds_and_never_past_them(scope: str, leading: tuple[int, ...]) -> None:
    target, draws = two_layer_target(), naive.Draws(1, 0, tuple(range(leading[0])), leading[1:])
    batch = normal(*leading, 3)
    ci = {"first": torch.full((*leading, 5), 0.1).double(), "second": torch.full((*leading, 3), 0.2).double()}

    def objective(sources: naive.PerSite, deltas: naive.PerSite) -> naive.Pair:
        return naive.reconstruction(target, batch, ci, sources, deltas, None, "mse")

    sources, deltas = naive.pgd_init(draws, target["sites"], "t", init="random", scope=scope)
    rows = leading if scope == "per_position" else (1,) * len(leading)
    assert sources["first"].shape == (*rows, 5) and deltas["first"].shape == rows
    assert torch.equal(sources["first"].flatten()[:5], draws.uniform(5, "t", "first", "source").flatten()[:5])
    near = naive.pgd(objective, sources, deltas, n_steps=1, step_size=0.01)
    assert objective(*near)[0] > objective(sources, deltas)[0]
    far = naive.pgd(objective, sources, deltas, n_steps=1, step_size=1.0)
    assert set(torch.cat([t.flatten() for tensors in far for t in tensors.values()]).tolist()) <= {0.0, 1.0}
    term = recon("pgd", init="random", scope=scope, n_steps=1, step_size=1.0)
    assert naive.reconstruction_term(target, batch, ci, "t", term, draws)[0] == objective(*far)[0]


def test_persistent_adversary_moves_by_formula() -> None:
    adam = naive.Adversary(optimizer="adam", lr=0.1, betas=(0.5, 0.9))
    source, grad, large = (torch.tensor([x]).double() for x in (0.5, 1e-4, 3.0))
    (first,) = adam([source], [grad])
    assert first.item() == pytest.approx(0.5 + 0.1 * 1e-4 / (1e-4 + 1e-8), rel=1e-9)
    (second,) = adam([first], [2 * grad])
    m, v = (0.25 + 1) / 0.75, (0.09 + 0.4) / 0.19
    assert second.item() == pytest.approx(first.item() + 0.1 * m / (math.sqrt(v) + 1e-4), rel=1e-9)
    free, clamped = (naive.Adversary(optimizer="sgd", lr=1.0, clamped=c)([source], [large])[0] for c in (False, True))
    assert (free.item(), clamped.item()) == (3.5, 1.0)


def test_schedule_values() -> None:
    def values(kind: str, **options: float) -> list[float]:
        return [naive.schedule_value(step, 5, 2.0, kind, **options) for step in range(5)]

    assert values("constant") == [2.0] * 5
    assert values("linear", final_frac=0.0) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    assert values("cosine", final_frac=0.5) == pytest.approx([2.0, 1.5 + 0.5**1.5, 1.5, 1.5 - 0.5**1.5, 1.0])
    assert values("cosine", final_frac=0.1)[-1] == 2.0 * 0.1
    assert values("linear", warmup_frac=0.4, final_frac=0.5) == pytest.approx([0.0, 1.0, 2.0, 1.5, 1.0])
    ramp = [naive.annealed_p(s, 5, p_start=2.0, p_end=1.0, start_frac=0.25, end_frac=0.75) for s in range(5)]
    assert ramp == pytest.approx([2.0, 2.0, 1.5, 1.0, 1.0])


@pytest.mark.parametrize("site_kind", ["conv1d", "embedding"])
@pytest.mark.parametrize("kind", ["scalar_mlp", "vector_mlp", "shared_mlp", "global_mlp"])
def test_gradients_equal_finite_differences(kind: str, site_kind: str) -> None:
    smooth, given = config(lower="sigmoid", upper="sigmoid", sampling="binomial"), two_layer_target(site_kind)
    target, ci_fn = naive.trainable_copy(given, ci_network(kind, [2], given))
    batch = torch.tensor([[0, 2], [1, 1]]) if site_kind == "embedding" else normal(2, 2, 3)
    params = [*naive.component_parameters(target), *naive.ci_parameters(ci_fn)]

    def total(*_: Tensor) -> Tensor:
        return naive.step_losses(target, ci_fn, batch, (4, 5), 1, smooth)[1]

    assert torch.autograd.gradcheck(total, params, fast_mode=True)


def test_a_trajectory_is_torch_adamw_on_the_clipped_total() -> None:
    warmup = {"steps": 3, "lr": 1e-2, "weight_decay": 0.1, "form": "relative"}
    schedule = {"start": 1e-2, "kind": "cosine", "warmup_frac": 0.25, "final_frac": 0.1}
    settings = config(faithfulness_warmup=warmup, lr_components=schedule)
    given, given_ci = two_layer_target(), ci_network("shared_mlp", [3])
    target, ci_fn = naive.trainable_copy(given, given_ci)
    components, ci = naive.component_parameters(target), naive.ci_parameters(ci_fn)
    first = torch.optim.AdamW(components, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        first.zero_grad()
        naive.value(naive.faithfulness(target["sites"], "relative")).backward()
        first.step()
    optimizer = torch.optim.AdamW([{"params": components}, {"params": ci, "lr": 2e-2}], weight_decay=0.0)
    batches, totals = [(normal(2, 3, seed=s), (2 * s, 2 * s + 1)) for s in range(4)], []
    for step, (batch, samples) in enumerate(batches):
        optimizer.zero_grad()
        values, total = naive.step_losses(target, ci_fn, batch, samples, step, settings)
        totals.append(sum(settings["terms"][name]["coeff"] * v.item() for name, v in values.items()))
        total.backward()
        torch.nn.utils.clip_grad_norm_(components, 0.5)
        optimizer.param_groups[0]["lr"] = [0.0, 1e-2, 5.5e-3, 1e-3][step]
        optimizer.step()
    history, after, after_ci = naive.trajectory(given, given_ci, batches, settings)
    assert [losses["total"] for losses in history] == pytest.approx(totals)
    ours = [*naive.component_parameters(after), *naive.ci_parameters(after_ci)]
    torch.testing.assert_close(ours, [*components, *ci], rtol=1e-10, atol=1e-12)


def test_a_sequence_axis_changes_nothing_but_the_draws() -> None:
    target = two_layer_target()
    attack = recon("pgd", init="ones", scope="shared", n_steps=2, step_size=0.1)
    terms = {"ci": recon("constant", value=0.0), "pgd": attack}
    ci_fn, batch = ci_network("vector_mlp", [2]), normal(4, 3)
    flat, _, _ = naive.trajectory(target, ci_fn, [(batch, range(4))] * 2, config(terms=terms))
    deep, _, _ = naive.trajectory(target, ci_fn, [(batch.reshape(2, 2, 3), range(2))] * 2, config(terms=terms))
    assert flat[1] == pytest.approx(deep[1]) and flat[0] != flat[1]
    both = [naive.step_losses(target, ci_fn, batch, range(4), step, config())[0] for step in (0, 1)]
    assert both[0]["stochastic_recon"].item() != both[1]["stochastic_recon"].item()


def test_l0_identity_and_dense_errors_by_hand() -> None:
    lower = {"h.0.a": torch.tensor([[[0.2, 0.3]], [[0.05, 0.9]]]), "h.1.a": torch.tensor([[[1.0]], [[1.0]]])}
    assert [*naive.ci_l0(lower, 0.1, {"block0": ["h.0.*"]}).values()] == [1.5, 1.0, 1.5, 2.5]
    shuffled = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.95], [1.0, 0.0, 0.0]])
    assert naive.identity_ci_error(shuffled) == 0
    shuffled[0, 0], shuffled[1, 2] = 0.15, 0.85
    assert (naive.identity_ci_error(shuffled), naive.identity_ci_error(shuffled, 0.2)) == (2, 0)
    assert naive.identity_ci_error(torch.eye(3)[:, :2]) == 1
    dense = torch.tensor([[0.0, 0.9, 0.95], [0.0, 1.0, 0.3]])
    assert [naive.dense_ci_error(dense, k) for k in (1, 2, 3, 4)] == [2, 0, 1, 2]


def test_similarity_and_length_ratio_by_hand() -> None:
    # Column 0 of W is (2, 0): subcomponent 0 gives (1, 0), exact direction at half length. Column 1 is (1, 1):
    # subcomponent 0 gives (-1, 0), subcomponent 1 gives (0, 3): cosine 1/sqrt(2), ratio 3/sqrt(2).
    weight = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    V, U = torch.tensor([[1.0, 0.0], [-1.0, 3.0]]), torch.eye(2)
    assert naive.mean_max_cosine_similarity(weight, V, U) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert naive.mean_l2_ratio(weight, V, U) == pytest.approx((0.5 + 3 / math.sqrt(2)) / 2)
