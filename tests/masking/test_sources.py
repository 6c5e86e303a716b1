"""What masks are made of: sources in range, drawn by key, and an adversary that climbs (spec R1, L5)."""

from __future__ import annotations

import math

import naive
import pytest
import torch
from parity import SEED, STEP, VECTOR_SITES, assert_same, batch_of, built, observed, oracle_of, source_of
from torch import Tensor

from pdlightning import ParameterDecomposition
from pdlightning.masking import PGD, AllSites, Bernoulli, Binomial, Constant, Masks, Route
from pdlightning.metrics import OutputMSE, ReconstructionLoss
from pdlightning.metrics.reconstruction import compare_masked
from pdlightning.modules import SharedMLP
from pdlightning.observation import Observation, observe

NAMES = ["uniform", "binomial", "constant:0", "constant:1", "constant:0.3"]
NAMES += [f"pgd:{init}:{scope}" for init in ("random", "ones", "zeros") for scope in ("per_position", "shared")]


def objective(observation: Observation, masks: Masks) -> Tensor:
    total, count = compare_masked(observation, Route(observation.sites), masks, OutputMSE())
    return total / count


def masks_of(name: str, observation: Observation, term: str = "term") -> Masks:
    source = source_of(name)
    return source(observation, term=term, sites=observation.sites, loss=lambda masks: objective(observation, masks))


def observation_of(leading: tuple[int, ...] = (4, 3), **key: int) -> Observation:
    return observed(built().float(), batch_of("vectors", leading).float(), **key)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("leading", [(5,), (4, 3)])
def test_masks_lie_between_ci_and_one(name: str, leading: tuple[int, ...]) -> None:
    observation = observation_of(leading)
    made = masks_of(name, observation)
    lower = observation.noisy_lower if name == "binomial" else observation.ci.lower
    for site, mask in made.masks.items():
        assert mask.shape == lower[site].shape
        assert bool((mask >= lower[site]).all()) and bool((mask <= 1 + 1e-6).all())
    if name.startswith("constant"):
        assert made.delta_masks is None, "in the ci and unmasked maskings the delta is absent"
    else:
        assert made.delta_masks is not None
        for delta in made.delta_masks.values():
            assert delta.shape == leading and delta.min() >= 0 and delta.max() <= 1


@pytest.mark.parametrize("name", ["uniform", "binomial", "pgd:random:per_position"])
def test_without_delta_there_is_no_delta_mask_and_the_sources_stay(name: str) -> None:
    observation = observation_of()
    if name.startswith("pgd"):
        source = PGD(n_steps=0, step_size=0.1, init="random", scope="per_position", delta=False)
    else:
        source = source_of(name, delta=False)
    made = source(observation, term="term", sites=observation.sites, loss=lambda masks: objective(observation, masks))
    assert made.delta_masks is None
    uniform = masks_of("binomial" if name == "binomial" else "uniform", observation)
    assert all(torch.equal(made.masks[s], uniform.masks[s]) for s in made.masks)


def test_constant_sources_are_the_named_maskings() -> None:
    observation = observation_of()
    lower = observation.ci.lower
    for value, expected in ((0, lower), (1, {s: torch.ones_like(x) for s, x in lower.items()})):
        made = masks_of(f"constant:{value}", observation).masks
        assert all(torch.equal(made[s], expected[s]) for s in lower)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["uniform", "binomial"])
def test_draws_follow_the_key_of_term_site_and_sample(name: str) -> None:
    observation = observed(built(), batch_of("vectors", (4, 3)), first=10)
    sites = oracle_of(observation.model)[0]["sites"]
    draws = naive.Draws(SEED, STEP, (10, 11, 12, 13), (3,))
    sources, deltas = naive.draw_sources(draws, sites, "term", name)
    lower = observation.noisy_lower if name == "binomial" else observation.ci.lower
    expected = naive.masks_from_sources(lower, sources)
    made = masks_of(name, observation)
    for s in sites:
        assert_same(made.masks[s], expected[s], s)
        assert_same(made.delta_masks[s], deltas[s], s)  # type: ignore[index]


def test_terms_sites_and_steps_draw_their_own_numbers() -> None:
    observation, later = observation_of((64,)), observation_of((64,), step=STEP + 1)
    made, other_term, other_step = (
        masks_of("uniform", observation), masks_of("uniform", observation, term="other"), masks_of("uniform", later)
    )  # fmt: skip
    base = made.delta_masks["first"]  # type: ignore[index]
    for other in (made.delta_masks["second"], other_term.delta_masks["first"], other_step.delta_masks["first"]):  # type: ignore[index]
        assert abs(float(torch.corrcoef(torch.stack([base, other]))[0, 1])) < 4 / math.sqrt(64)


def test_binomial_sources_are_zero_or_one_evenly_and_their_delta_is_uniform() -> None:
    observation = observation_of((4096,))
    made, lower = masks_of("binomial", observation), observation.noisy_lower
    for s, mask in made.masks.items():
        open_ = lower[s] < 0.99
        r = ((mask - lower[s]) / (1 - lower[s]))[open_]
        assert bool(((r.abs() < 1e-4) | ((r - 1).abs() < 1e-4)).all())
        assert abs(float(r.detach().mean()) - 0.5) < 4 * 0.5 / math.sqrt(r.numel())
        assert len(made.delta_masks[s].unique()) > 4000  # type: ignore[index]


@pytest.mark.usefixtures("float64")
def test_binomial_sources_may_fill_the_plain_ci() -> None:
    observation = observed(built(), batch_of("vectors", (4, 3)))
    sites = oracle_of(observation.model)[0]["sites"]
    sources, _ = naive.draw_sources(naive.Draws(SEED, STEP, tuple(range(4)), (3,)), sites, "term", "binomial")
    expected = naive.masks_from_sources(observation.ci.lower, sources)
    source = Binomial(noisy=False)
    made = source(observation, term="term", sites=list(sites), loss=lambda masks: objective(observation, masks))
    for s in sites:
        assert_same(made.masks[s], expected[s], s)


@pytest.mark.parametrize("scope", ["per_position", "shared"])
@pytest.mark.parametrize("init", ["random", "ones", "zeros"])
def test_each_rung_of_the_adversary_stays_in_range_and_the_climb_pays(init: str, scope: str) -> None:
    observation = observation_of((16,))
    # From ones the whole delta would be in place, the output the target's, and no gradient there.
    source = PGD(n_steps=20, step_size=0.1, init=init, scope=scope, delta=init != "ones")  # type: ignore[arg-type]
    arguments = {"term": "term", "sites": observation.sites, "loss": lambda masks: objective(observation, masks)}
    values = source.start(observation, term="term", sites=observation.sites)
    start = objective(observation, source.masks(observation, values, detach_ci=True)).item()
    for _ in range(20):
        values = source.ascend(observation, values, loss=arguments["loss"])
        assert all(v.min() >= 0 and v.max() <= 1 for _, _, v in values)
    end = objective(observation, source.masks(observation, values, detach_ci=True)).item()
    assert end > start
    assert objective(observation, source(observation, **arguments)).item() == pytest.approx(end)  # type: ignore[arg-type]
    leading = {(1,)} if scope == "shared" else {(16,)}
    assert {tuple(v.shape[:-1]) for _, _, v in values} == leading


def test_the_adversary_attacks_where_gradients_are_off_and_leaves_no_gradient_behind() -> None:
    observation = observation_of((8,))
    with torch.no_grad():
        made = masks_of("pgd:zeros:shared", observation)
        weak = masks_of("constant:0", observation)
        assert objective(observation, made) > objective(observation, Masks(weak.masks, None))
    assert all(p.grad is None for p in observation.model.parameters())


def test_training_an_attacked_loss_moves_ci_through_the_last_masks() -> None:
    observation = observation_of((8,))
    value = objective(observation, masks_of("pgd:random:shared", observation))
    parameters = list(observation.model.ci_fn.parameters())
    assert any(bool(g.any()) for g in torch.autograd.grad(value, parameters))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Constant(value=1.1), r"Constant\(value\).*\[0, 1\], got 1.1"),
        (lambda: Constant(value=-0.1), "got -0.1"),
        (lambda: Bernoulli(p=1.5), r"Bernoulli\(p\).*\[0, 1\], got 1.5"),
        (lambda: PGD(n_steps=-1, step_size=0.1, init="ones", scope="shared"), "n_steps must be >= 0.*got -1"),
        (lambda: PGD(n_steps=1, step_size=0.0, init="ones", scope="shared"), "step_size > 0"),
        (lambda: PGD(n_steps=1, step_size=0.1, init="one", scope="shared"), "random, ones or zeros.*got one"),  # type: ignore[arg-type]
        (lambda: PGD(n_steps=1, step_size=0.1, init="ones", scope="share"), "per_position or shared.*share"),  # type: ignore[arg-type]
    ],
)
def test_impossible_sources_are_refused(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["uniform", "binomial", "constant:0.5", "pgd:random:shared"])
def test_only_the_sites_asked_for_are_masked(name: str) -> None:
    observation, source = observation_of(), source_of(name)
    made = source(observation, term="term", sites=["second"], loss=lambda masks: objective(observation, masks))
    assert list(made.masks) == ["second"]
    assert made.delta_masks is None or list(made.delta_masks) == ["second"]


def test_the_noise_of_a_term_that_is_only_measured_keeps_the_gradient_of_the_next() -> None:
    """Both interpolate the one noisy lower ci of the step, which the first asks for without gradient."""

    def decomposition(*names: str) -> ParameterDecomposition:
        losses = {
            name: ReconstructionLoss(
                coeff=float(name == "trained"), source=Binomial(), routing=AllSites(), comparison=OutputMSE()
            )
            for name in names
        }
        model = built().float()
        return ParameterDecomposition(
            target=model.restore(), sites=VECTOR_SITES, ci_fn=SharedMLP(hidden=[3]), losses=losses, seed=SEED
        )

    gradients = []
    for names in (("measured", "trained"), ("trained",)):
        pd = decomposition(*names)
        pd.compute_step(batch_of("vectors", (6,)).float(), torch.tensor(STEP, dtype=torch.int32)).total.backward()
        gradients.append([p.grad for p in pd.model.ci_fn.parameters()])
    assert all(g is not None and g.any() for g in gradients[1])
    assert_equal_all(*gradients)


def assert_equal_all(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_noise_without_a_gradient_is_refused_in_training() -> None:
    model, batch = built().float(), batch_of("vectors", (4,)).float()
    now = torch.tensor(STEP, dtype=torch.int32)
    observation = observe(model, batch, seed=SEED, step=now, training=True, noisy=False)
    with pytest.raises(RuntimeError, match="noisy=True"):
        _ = observation.noisy_lower
