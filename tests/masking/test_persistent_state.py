"""What a persistent adversary keeps: how it is made, moved, stored, evaluated, and refused where it does not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from adversaries import (
    BATCH,
    COMMON,
    MERGED,
    Loader,
    config_of,
    decomposition,
    loss_of,
    quiet,
    source_of,
    sources_of,
)
from parity import SEED, TOKEN_SITES, VECTOR_SITES, assert_same, batch_of, observed, tokens_chain
from torch import Tensor

from pdlightning import ParameterDecomposition
from pdlightning.callbacks import Evaluate
from pdlightning.checkpoints import AtomicCheckpointIO
from pdlightning.functional import derivatives
from pdlightning.masking import (
    PGD,
    AdamAscent,
    AllSites,
    EachSite,
    ParticlePool,
    PersistentPGD,
    SGDAscent,
    SignAscent,
    Uniform,
    UniformSubset,
)
from pdlightning.masking.held import ascent_state
from pdlightning.masking.persistent import held_key
from pdlightning.metrics import MergedReconstructionLoss, OutputMSE, ReconstructionLoss
from pdlightning.modules import SharedMLP

SCOPES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "single": ({"scope": "single"}, (1, 1)),
    "shared": ({"scope": "per_position_shared_batch"}, (1, 2)),
    "repeat": ({"scope": "repeat", "n_sources": 2}, (2, 2)),
    "by sample": ({"scope": "per_sample_per_position"}, (4, 2)),
    "pool": ({"scope": "pool", "n_particles": 3}, (3, 4, 2)),
}
KINDS: dict[str, dict[str, Any]] = {name: COMMON | fields for name, (fields, _) in SCOPES.items()}
KINDS |= {"merged pool": COMMON | MERGED | {"scope": "pool", "n_particles": 2}}


def fit(pd: ParameterDecomposition, steps: int, *, leading: tuple[int, ...] = (BATCH, 2), **arguments: Any) -> None:
    data = "vectors" if "first" in pd.components else "tokens"
    batches = Loader(batch_of(data, leading, seed=step) for step in range(steps))
    quiet(steps, **arguments).fit(pd, batches)


def state(pd: ParameterDecomposition) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pd.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("name", SCOPES)
def test_a_scope_holds_its_shape_of_sources_and_one_for_each_delta(name: str) -> None:
    pd = decomposition({"term": KINDS[name]}, "tokens")
    fit(pd, 1)
    held, leading = sources_of(pd, "term"), SCOPES[name][1]
    assert {key: tuple(value.shape) for key, value in held.items()} == {
        held_key(site, what): (*leading, C if what == "source" else 1)
        for site, C in TOKEN_SITES.items()
        for what in ("source", "delta")
    }
    assert not any("held" in key for key, _ in pd.named_parameters())
    assert all(value.min() >= 0 and value.max() <= 1 for value in held.values())


def test_sources_start_uniform_or_normal_and_each_at_its_own_number() -> None:
    batch = torch.randn(256, 3)
    for parameterisation, mean, deviation in (("clamp", 0.5, 12**-0.5), ("sigmoid", 0.0, 1.0)):
        source = source_of(COMMON | {"parameterisation": parameterisation})
        model = decomposition({}).model
        source(observed(model, batch), term="term", sites=list(VECTOR_SITES), loss=None)
        numbers = torch.cat([held.value.detach().flatten() for held in source.held.values()])  # type: ignore[union-attr]
        assert len(numbers.unique()) > 0.999 * numbers.numel()
        assert float(numbers.mean()) == pytest.approx(mean, abs=4 * deviation / len(numbers) ** 0.5)
        assert float(numbers.std()) == pytest.approx(deviation, rel=0.1)


@pytest.mark.usefixtures("float64")
def test_one_backward_serves_weights_and_sources() -> None:
    """Forwards of the target: one clean, one for each warmup, one for the term; the backward runs through the last."""
    pd = decomposition({"term": COMMON | {"n_warmup": 2}})
    forwards, backwards = [], []
    pd.target["relu"].register_forward_hook(lambda *_: forwards.append(1))  # type: ignore[index, operator]
    for name in ("second",):
        pd.components[name].U.register_hook(lambda g: backwards.append(1))
    fit(pd, 3)
    assert len(forwards) == 3 * (1 + 2 + 1) and len(backwards) == 3


def test_an_ascent_does_not_depend_on_the_coefficient() -> None:
    """The sources of the first step, before other coefficients have led to other weights."""
    held = []
    for coeff in (0.01, 1.0, 30.0):
        pd = decomposition({"term": COMMON | {"coeff": coeff, "optimizer": "sgd", "lr": 5.0}})
        fit(pd, 1)
        held.append(sources_of(pd, "term"))
    for key, value in held[1].items():
        torch.testing.assert_close(held[0][key], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(held[2][key], value, rtol=1e-5, atol=1e-6)


def test_a_term_that_is_only_measured_is_warmed_up_and_changes_no_weight() -> None:
    with_term, without = decomposition({"term": COMMON | {"coeff": 0.0}}), decomposition({})
    fit(with_term, 3)
    fit(without, 3)
    assert all(held.count == 3 * 2 for held in with_term.terms["term"].source.held.values())  # type: ignore[attr-defined]
    for ours, theirs in zip(with_term.parameters(), without.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_only_the_particles_in_use_move_with_their_moments_and_counts() -> None:
    pd = decomposition({"term": KINDS["pool"]})
    fit(pd, 1)
    before = state(pd)
    observation = observed(pd.model, batch_of("vectors", (BATCH, 2)), step=1)
    source = pd.terms["term"].source  # type: ignore[attr-defined]
    particles, samples = source.drawn(observation, term="term", among=BATCH)
    used = torch.zeros(3, BATCH, dtype=torch.bool)
    used[particles, samples] = True
    assert used.sum() == BATCH and used.any(1).sum() > 1
    pd.set_progress(1)
    pd.compute_step(batch_of("vectors", (BATCH, 2), seed=1), pd.step_now).total.backward()
    pd.after_backward()
    for name, after in pd.state_dict().items():
        if name.endswith(".count"):
            assert torch.equal(after - before[name], 3.0 * used), name
        elif ".held." in name:
            moved = (after != before[name]).flatten(2).any(-1)
            assert moved.any() and bool((moved <= used).all()), name


def test_samples_that_are_not_adversarial_give_the_sources_no_gradient() -> None:
    term = COMMON | MERGED | {"optimizer": "sgd", "lr": 1.0, "n_warmup": 1}
    pd, batch = decomposition({"term": term}), batch_of("vectors", (64, 2))
    observation = observed(pd.model, batch, step=0)
    adversarial = observation.random_of(observation.samples).uniform(1, "term", "adversarial").squeeze(-1) < 0.5
    assert 16 < adversarial.sum() < 48
    source = pd.terms["term"].source  # type: ignore[attr-defined]
    source.make(observation, term="term")
    before = {key: held.value.detach().clone() for key, held in source.held.items()}
    pd.steps = 1
    pd.set_progress(0)
    pd.compute_step(batch, pd.step_now).total.backward()
    for key, held in source.held.items():
        for changed in (held.value.grad != 0, held.value != before[key]):
            of_sample = changed.flatten(1).any(1)
            assert of_sample.sum() > 8 and bool((of_sample <= adversarial).all()), key


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_merged_term_of_one_kind_is_that_term(p: float) -> None:
    term, batch = KINDS["by sample"], batch_of("vectors", (BATCH, 2))
    merged = decomposition({"term": term | MERGED | {"p": p}})
    uniform = ReconstructionLoss(coeff=0.7, source=Uniform(), routing=UniformSubset(), comparison=OutputMSE())
    alone = decomposition({"term": term})
    uniform.term = "term"
    for step in range(2):
        observation = observed(merged.model, batch, step=step)
        one = merged.terms["term"].measure(observation)
        other = alone.terms["term"].measure(observation) if p else uniform.measure(observation)
        assert one[1] == other[1]
        assert_same(one[0], other[0])


class Killed(lightning.Callback):
    """Saves after the third step, and dies in the fourth when the warmups have moved the sources."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)

    def on_before_backward(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            raise InterruptedError


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_is_bit_identical(kind: str, tmp_path: Path) -> None:
    terms = {"term": KINDS[kind]}
    whole, first, second = (decomposition(terms, "tokens") for _ in range(3))
    batches = [batch_of("tokens", (BATCH, 2), seed=step) for step in range(6)]
    quiet(6).fit(whole, Loader(batches))
    with pytest.raises(InterruptedError):
        quiet(6, plugins=[AtomicCheckpointIO()], callbacks=[Killed(tmp_path / "step=3.ckpt")]).fit(
            first, Loader(batches)
        )
    trainer = quiet(6, plugins=[AtomicCheckpointIO()])
    trainer.fit(second, Loader(batches[3:]), ckpt_path=tmp_path / "step=3.ckpt")
    assert trainer.global_step == 6
    assert_equal(state(second), state(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_leaves_every_source_as_it_is(kind: str) -> None:
    terms = {"term": KINDS[kind]}
    quietly, looked_at = decomposition(terms, "tokens"), decomposition(terms, "tokens")
    fit(quietly, 4)
    other_sizes = [batch_of("tokens", (size, 2), seed=9 + size) for size in (7, 4, 2)]
    evaluation = Evaluate(metrics={}, slow_metrics={}, every=1, slow_every=1, batches=other_sizes)
    fit(looked_at, 4, callbacks=[evaluation])
    assert evaluation.latest["eval/loss/term"] > 0
    assert_equal(state(looked_at), state(quietly))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["single", "shared", "repeat", "by sample"])
def test_evaluation_measures_with_the_sources_as_they_stand(name: str) -> None:
    pd = decomposition({"term": KINDS[name]}, "tokens")
    fit(pd, 2)
    loss, batch = copy.deepcopy(pd.terms["term"]), batch_of("tokens", (6, 2), seed=5)
    observation = observed(pd.model, batch, step=-1)
    observation.training = False
    total, count = loss.measure(observation)
    held = sources_of(pd, "term")
    rows = {key: value.detach().expand(max(len(value), 1), 2, -1) for key, value in held.items()}
    at = lambda key: torch.stack([rows[key][b % len(rows[key])] for b in range(6)])  # noqa: E731
    lower = observation.ci.lower
    masks = {s: lower[s] + (1 - lower[s]) * at(held_key(s, "source")) for s in TOKEN_SITES}
    deltas = {s: at(held_key(s, "delta")).squeeze(-1) for s in TOKEN_SITES}
    masked = pd.model.masked(batch, masks, delta_masks=deltas).output
    assert_same(total, (masked - observation.clean.output).square().sum())
    assert count == masked.numel()


def test_sources_keep_their_precision_and_follow_the_device() -> None:
    pd = decomposition({"term": COMMON}).bfloat16()
    pd.terms["term"].source.make(observed(pd.model, batch_of("vectors", (BATCH, 2)).bfloat16()), term="term")  # type: ignore[attr-defined]
    pd.bfloat16()
    fit_dtype = {value.dtype for value in sources_of(pd, "term").values()}
    assert fit_dtype == {torch.float32}
    assert all(value.requires_grad for value in sources_of(pd, "term").values())
    assert {value.device.type for value in sources_of(pd.to("meta"), "term").values()} == {"meta"}


def test_a_training_in_bfloat16_moves_sources_by_less_than_bfloat16_resolves() -> None:
    pd = decomposition({"term": COMMON | {"optimizer": "sign", "lr": 1e-4, "n_warmup": 0}})
    batches = Loader(batch_of("vectors", (BATCH, 2), seed=s).bfloat16() for s in range(2))
    quiet(2, precision="bf16-true").fit(pd, batches)
    start = decomposition({"term": COMMON})
    start.terms["term"].source.make(observed(start.model, batch_of("vectors", (BATCH, 2))), term="term")  # type: ignore[attr-defined]
    moved = [
        float((value.detach() - before.detach()).abs().max())
        for value, before in zip(sources_of(pd, "term").values(), sources_of(start, "term").values(), strict=True)
    ]
    assert all(0.9e-4 < x < 2.1e-4 for x in moved)


def test_exported_sources_load_without_the_state_of_their_ascents() -> None:
    pd, other = decomposition({"term": COMMON}), decomposition({"term": COMMON})
    fit(pd, 2)
    further = ascent_state(pd)
    assert further and all(name.endswith((".first", ".second", ".count")) for name in further)
    other.load_state_dict({name: value for name, value in pd.state_dict().items() if name not in further})
    assert all(held.count == 0 for held in other.terms["term"].source.held.values())  # type: ignore[attr-defined]
    for key, value in sources_of(pd, "term").items():
        assert torch.equal(sources_of(other, "term")[key], value)
    fit(other, 1)


@pytest.mark.parametrize(
    ("stored", "here", "said"),
    [
        ({"delta": False}, {}, "sources are .*first:source.*expected .*first:delta"),
        ({"scope": "repeat", "n_sources": 2}, {"scope": "repeat", "n_sources": 4}, r"positions \(2, 2\).*scope=repeat"),
        ({}, {"scope": "single"}, r"positions \(4, 2\), which scope=single has not"),
        ({"scope": "pool", "n_particles": 3}, {"scope": "pool", "n_particles": 2}, "3 particles .* expected 2"),
    ],
)
def test_stored_sources_that_do_not_fit_are_refused(stored: Any, here: Any, said: str) -> None:
    pd = decomposition({"term": COMMON | stored})
    fit(pd, 1)
    with pytest.raises(RuntimeError, match=said):
        decomposition({"term": COMMON | here}).load_state_dict(pd.state_dict())


def test_stored_sources_of_another_C_are_refused() -> None:
    pd = decomposition({"term": COMMON}, "tokens")
    fit(pd, 1)
    sites = {**TOKEN_SITES, "conv": 5}
    losses = {"term": loss_of(COMMON)}
    other = ParameterDecomposition(
        target=tokens_chain(), sites=sites, ci_fn=SharedMLP(hidden=[3]), losses=losses, seed=SEED
    )
    with pytest.raises(RuntimeError, match="conv:source has C=3, expected C=5"):
        other.load_state_dict(pd.state_dict(), strict=False)


@pytest.mark.parametrize(
    ("term", "sizes", "said"),
    [
        ({"scope": "repeat", "n_sources": 3}, [(4, 2)], "n_sources=3 does not divide the 4 samples"),
        ({}, [(4, 2), (3, 2)], "holds sources for 4 samples, but the batch has 3"),
        ({"scope": "per_position_shared_batch"}, [(4, 2), (4, 3)], r"positions \(2,\), but the batch has \(3,\)"),
        ({"scope": "pool", "n_particles": 2}, [(4, 2), (2, 2)], "ParticlePool holds sources for 4 samples"),
    ],
)
def test_batches_that_do_not_fit_are_refused(term: Any, sizes: list[tuple[int, ...]], said: str) -> None:
    pd = decomposition({"term": COMMON | term})
    with pytest.raises(ValueError, match=said):
        quiet(len(sizes)).fit(pd, Loader(batch_of("vectors", size) for size in sizes))


@pytest.mark.parametrize(
    ("term", "arguments", "said"),
    [
        ({}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2.*takes n_warmup=0 and another scope"),
        ({"scope": "single"}, {"accumulate_grad_batches": 2}, "n_warmup=2.* a warmup would see one part"),
        ({"scope": "pool", "n_particles": 2, "n_warmup": 0}, {"accumulate_grad_batches": 2}, "ParticlePool"),
    ],
)
def test_trainings_that_cannot_be_are_refused(term: Any, arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit(decomposition({"term": COMMON | term}), 2, **arguments)


def test_a_scaled_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="16-mixed has scaled: take bf16-mixed"):
        source_of(COMMON).check_training(micro_batches=1, loss_scaled=True)


def test_two_losses_cannot_share_an_adversary() -> None:
    source = source_of(COMMON)
    losses = {
        name: ReconstructionLoss(coeff=1.0, source=source, routing=AllSites(), comparison=OutputMSE())
        for name in ("one", "other")
    }
    with pytest.raises(ValueError, match="Two losses share one persistent adversary"):
        ParameterDecomposition(
            target=tokens_chain(), sites=TOKEN_SITES, ci_fn=SharedMLP(hidden=[3]), losses=losses, seed=SEED
        )


ADAM = {"lr": 0.1, "betas": (0.5, 0.9)}
PGD_ARGUMENTS: dict[str, Any] = {"optimizer": SignAscent(lr=0.1), "scope": "single", "n_warmup": 0}
MERGE: dict[str, Any] = {
    "coeff": 1.0, "p": 0.5, "adversary_routing": AllSites(), "stochastic": Uniform(), "comparison": OutputMSE(),
    "stochastic_routing": UniformSubset(),
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SignAscent(lr=-1.0), r"SignAscent\(lr\).*got -1"),
        (lambda: SGDAscent(lr=float("nan")), r"SGDAscent\(lr\).*got nan"),
        (lambda: AdamAscent(**ADAM | {"betas": (0.5, 1.0)}), r"two numbers in \[0, 1\)"),
        (lambda: AdamAscent(**ADAM, eps=0.0), "eps > 0"),
        (lambda: PersistentPGD(**PGD_ARGUMENTS | {"scope": "all"}), "scope is one of single.*got all"),
        (lambda: PersistentPGD(**PGD_ARGUMENTS | {"n_warmup": -1}), "n_warmup >= 0"),
        (lambda: PersistentPGD(**PGD_ARGUMENTS | {"scope": "repeat"}), "takes n_sources >= 1.*repeat, None"),
        (lambda: PersistentPGD(**PGD_ARGUMENTS, n_sources=2), "no other does; got single, 2"),
        (lambda: PersistentPGD(**PGD_ARGUMENTS, init="one"), "init is random, ones or zeros"),  # type: ignore[arg-type]
        (lambda: PersistentPGD(**PGD_ARGUMENTS, parameterisation="sigmoid", init="ones"), "init random, got ones"),
        (lambda: ParticlePool(n_particles=0, optimizer=SignAscent(lr=0.1), n_warmup=0), "n_particles must be >= 1"),
        (lambda: MergedReconstructionLoss(**MERGE, adversary=Uniform()), "adversary=Uniform, stochastic=Uniform"),
        (
            lambda: MergedReconstructionLoss(**MERGE | {"stochastic": source_of(COMMON)}, adversary=source_of(COMMON)),
            "stochastic=PersistentPGD",
        ),
        (
            lambda: MergedReconstructionLoss(**MERGE | {"stochastic_routing": EachSite()}, adversary=source_of(COMMON)),
            "EachSite is a routing of many",
        ),
        (lambda: MergedReconstructionLoss(**MERGE | {"p": 1.5}, adversary=source_of(COMMON)), r"\[0, 1\], got 1.5"),
    ],
)
def test_impossible_adversaries_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("data", "large"), [("vectors", derivatives.LARGE), ("tokens", derivatives.LARGE), ("tokens", 1)]
)
def test_a_compiled_training_is_the_eager_one(data: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivatives, "LARGE", large)
    terms = config_of(["adam by sample", "pool", "merged"])
    eager, compiled = decomposition(terms, data), decomposition(terms, data, compile=True)
    compiled.compiled_step = torch.compile(compiled._compute_step, backend="aot_eager")
    leading = (BATCH,) if data == "vectors" else (BATCH, 2)
    for pd in (eager, compiled):
        fit(pd, 4, leading=leading)
    for name, value in state(eager).items():
        torch.testing.assert_close(state(compiled)[name], value, rtol=1e-10, atol=1e-12)


def test_the_trainer_calls_the_ascent_before_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    pd = decomposition({"term": COMMON})
    original = pd.after_backward

    def after_backward() -> None:
        seen.append([p.detach().clone() for p in pd.components.parameters()])
        original()

    monkeypatch.setattr(pd, "after_backward", after_backward)
    start = [p.detach().clone() for p in pd.components.parameters()]
    fit(pd, 1)
    assert len(seen) == 1 and all(torch.equal(one, other) for one, other in zip(seen[0], start, strict=True))
    assert isinstance(pd, lightning.LightningModule)


@pytest.mark.usefixtures("float64")
def test_a_merged_term_attacks_with_a_fresh_adversary_too() -> None:
    pd, batch = decomposition({}), batch_of("vectors", (BATCH, 2))
    pgd: dict[str, Any] = {"n_steps": 3, "step_size": 0.2, "init": "random", "scope": "per_position"}
    alone = ReconstructionLoss(coeff=1.0, source=PGD(**pgd), routing=AllSites(), comparison=OutputMSE())
    merged = MergedReconstructionLoss(**MERGE | {"p": 1.0}, adversary=PGD(**pgd))
    half = MergedReconstructionLoss(**MERGE, adversary=PGD(**pgd))
    alone.term = merged.term = half.term = "term"
    observation = observed(pd.model, batch)
    (total, count), (same, same_count) = alone.measure(observation), merged.measure(observation)
    assert count == same_count
    assert_same(total, same)
    assert half.measure(observation)[0] < total
