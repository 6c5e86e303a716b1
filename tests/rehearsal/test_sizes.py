"""What a run is said to need, against what its tensors measure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from pdlightning import ParameterDecomposition
from pdlightning.config import ConfigError
from pdlightning.functional import derivatives
from pdlightning.masking import (
    PGD,
    AdamAscent,
    AllSites,
    Constant,
    EachSite,
    ParticlePool,
    PersistentPGD,
    SignAscent,
    Uniform,
    UniformSubset,
)
from pdlightning.metrics import FaithfulnessLoss, ImportanceMinimalityLoss, OutputKL, OutputMSE, ReconstructionLoss
from pdlightning.modules import GlobalTransformer, ScalarMLP, SharedMLP
from pdlightning.modules.sequence_blocks import Block
from pdlightning.rehearsal import sizes
from pdlightning.rehearsal.dry import DryDecomposition
from pdlightning.rehearsal.sizes import SiteSize, Sizes, sizes_of
from pdlightning.runtime import mixed_precision
from pdlightning.targets.language import GPT2Simple
from pdlightning.targets.tms import TMS


def adam() -> AdamAscent:
    return AdamAscent(lr=0.01, betas=(0.5, 0.99))


SOURCES = {
    "single": lambda: PersistentPGD(optimizer=SignAscent(lr=0.1), scope="single", n_warmup=1),
    "per_position_shared_batch": lambda: PersistentPGD(optimizer=adam(), scope="per_position_shared_batch", n_warmup=1),
    "repeat": lambda: PersistentPGD(optimizer=adam(), scope="repeat", n_sources=2, n_warmup=1),
    "per_sample_per_position": lambda: PersistentPGD(optimizer=adam(), scope="per_sample_per_position", n_warmup=2),
    "pool": lambda: ParticlePool(optimizer=adam(), n_particles=3, n_warmup=1, delta=False),
}
BASE = {"faithfulness": FaithfulnessLoss, "importance": lambda coeff: ImportanceMinimalityLoss(coeff=coeff, p=1.0)}


def tms(batch_size: int = 4096) -> tuple[ParameterDecomposition, Tensor]:
    def recon(routing: Any) -> ReconstructionLoss:
        return ReconstructionLoss(coeff=1.0, source=Uniform(), routing=routing, comparison=OutputMSE())

    pd = ParameterDecomposition(
        target=TMS(n_features=5, n_hidden=2, tied=True, seed=0).requires_grad_(False),
        sites={"linear1": 20, "linear2": 20},
        ci_fn=ScalarMLP(hidden=[16]),
        losses={name: make(coeff=1.0) for name, make in BASE.items()}
        | {"recon": recon(AllSites()), "layerwise": recon(EachSite())},
    )
    return pd, torch.rand(batch_size, 5)


def language_model(source: str = "per_sample_per_position") -> tuple[ParameterDecomposition, Tensor]:
    def recon(source: Any, routing: Any) -> ReconstructionLoss:
        return ReconstructionLoss(coeff=0.5, source=source, routing=routing, comparison=OutputKL())

    target = GPT2Simple(vocab_size=512, n_ctx=64, d_model=32, n_layers=2, n_heads=2, d_mlp=128, norm="layer", seed=0)
    pd = ParameterDecomposition(
        target=target.requires_grad_(False),
        sites={"h.*.attn.*_proj": 24, "h.*.mlp.*": 40},
        ci_fn=GlobalTransformer(d_model=32, n_blocks=2, n_heads=2, mlp_hidden=[64]),
        losses={name: make(coeff=1.0) for name, make in BASE.items()}
        | {"subset": recon(Uniform(), UniformSubset()), "persistent": recon(SOURCES[source](), AllSites())},
    )
    return pd, torch.arange(8 * 64).reshape(8, 64) % 512


def measured(tensors: Iterable[Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


@pytest.mark.parametrize("source", [None, *SOURCES])
def test_the_certain_part_is_what_the_tensors_of_a_step_measure(source: str | None):
    pd, batch = tms(64) if source is None else language_model(source)
    told = sizes_of(pd, batch, precision="32-true").certain
    frozen = measured({p.data_ptr(): p for p in [*pd.target.parameters(), *pd.target.buffers()]}.values())
    trained = [*pd.components.parameters(), *pd.model.ci_fn.parameters()]
    gradients: list[int] = []

    class Look(lightning.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            gradients.append(measured(p.grad for p in trained if p.grad is not None))

    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, inference_mode=False, callbacks=[Look()],
    )  # fmt: skip
    trainer.fit(pd, DataLoader([batch] * 2, batch_size=None))
    state = [x for values in trainer.optimizers[0].state.values() for x in values.values()]
    assert told == {
        "frozen target": frozen - measured(pd.components.parameters()),
        "trained parameters": measured(trained),
        "gradients": gradients[-1],
        "optimizer": measured(state),
        "persistent sources": measured(x for s in pd.persistent for held in s.held.values() for x in held.buffers()),
    }
    assert (told["persistent sources"] > 0) == (source is not None)


def peak_of_a_step(pd: ParameterDecomposition, batch: Tensor, precision: str = "32-true") -> int:
    """The most bytes beyond those before, as the allocator saw them; sources and constants are there already."""
    pd.steps = 1
    pd.set_progress(0)

    def step() -> None:
        with mixed_precision(precision, torch.device("cpu")):
            total = pd._compute_step(batch, pd.step_now, None, None).total
        total.backward()
        pd.after_backward()

    step()
    pd.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("large", [1, derivatives.LARGE])
@pytest.mark.parametrize(
    ("case", "precision", "twice"),
    [
        (tms, "32-true", False),
        *((language_model, p, twice) for p in ("32-true", "bf16-mixed") for twice in (False, True)),
    ],
)
def test_activations_are_told_from_above_within_a_tenth(
    case: Any, precision: str, twice: bool, large: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(derivatives, "LARGE", large)
    pd, batch = case()
    for module in pd.model.ci_fn.modules():
        if isinstance(module, Block):
            module.checkpoint_activations = twice
    told, kept = (sizes_of(pd, batch, precision=precision, gradients_kept=kept) for kept in (False, True))
    assert told.step is not None and kept.step is not None
    peak = peak_of_a_step(pd, batch, precision)
    together = told.step.activations + told.parameter_bytes
    assert peak <= together <= 1.1 * peak
    assert told.step.activations <= kept.step.activations <= together, "gradients take room that others have left"


def test_a_batch_of_another_size_and_other_precisions():
    pd, batch = language_model()
    told = {p: sizes_of(pd, batch, precision=p, samples=16) for p in ("32-true", "bf16-mixed", "bf16-true")}
    steps = {p: s.step for p, s in told.items()}
    full, mixed, true = steps["32-true"], steps["bf16-mixed"], steps["bf16-true"]
    half = sizes_of(pd, batch, precision="32-true").step
    assert full and mixed and true and half
    assert full.sources == pytest.approx(2 * half.sources, rel=1e-3)
    assert 1.7 < full.activations / half.activations < 2.05 and 1.5 < full.flops / half.flops <= 2
    assert 0.45 < mixed.activations / full.activations < 0.85 and mixed.flops == full.flops
    assert told["bf16-true"].parameter_bytes * 2 == told["bf16-mixed"].parameter_bytes
    assert true.sources == full.sources  # bfloat16 would swallow small ascents


def test_ranks_that_share_what_is_trained_hold_a_part_and_gather_the_whole():
    pd, batch = language_model()
    alone, shared = (sizes_of(pd, batch, precision="32-true", shards=n).certain for n in (1, 2))
    for what in ("trained parameters", "gradients", "optimizer"):
        assert 2 * shared[what] == alone[what]
    assert shared["parameters gathered for a step"] == alone["trained parameters"]
    assert shared["persistent sources"] == alone["persistent sources"]


def test_flops_are_those_of_the_products_written_down_by_hand():
    B, d_in, d_out, C, h = 7, 5, 3, 4, 6
    pd = ParameterDecomposition(
        target=nn.Sequential(nn.Linear(d_in, d_out)).requires_grad_(False),
        sites={"0": C},
        ci_fn=SharedMLP(hidden=[h]),
        losses={
            "faithfulness": FaithfulnessLoss(coeff=1.0),
            "ci": ReconstructionLoss(coeff=1.0, source=Constant(value=0), routing=AllSites(), comparison=OutputMSE()),
        },
    )
    clean = B * d_in * d_out
    ci = 2 * B * d_in * h + 3 * B * h * C  # forward and weights; and the input of the second layer
    faithfulness = 3 * d_in * C * d_out  # V U, and its two factors
    masked = 2 * B * d_in * C + 3 * B * C * d_out  # nobody asks for the gradient of x
    cost = DryDecomposition(pd, precision="32-true").cost(torch.rand(B, d_in))
    assert cost.flops == 2 * (clean + ci + faithfulness + masked)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_every_ascent_of_an_adversary_is_counted(n_steps: int):
    def flops(n: int) -> int:
        source = PGD(n_steps=n, step_size=0.1, init="random", scope="shared")
        pd = ParameterDecomposition(
            target=nn.Sequential(nn.Linear(5, 3)).requires_grad_(False),
            sites={"0": 4},
            ci_fn=SharedMLP(hidden=[6]),
            losses={"pgd": ReconstructionLoss(coeff=1.0, source=source, routing=AllSites(), comparison=OutputMSE())},
        )
        return DryDecomposition(pd, precision="32-true").cost(torch.rand(7, 5)).flops

    # One more is a product with U and one back; x V and x W^T of a clean input are kept, but x V needs its gradient.
    assert flops(n_steps) - flops(0) >= n_steps * 2 * 7 * 4 * 3 * 2


def test_counting_leaves_the_decomposition_and_the_draws_as_they_were():
    pd, batch = language_model()
    before = {name: x.clone() for name, x in pd.state_dict().items()}
    state = torch.get_rng_state()
    sizes_of(pd, batch, precision="32-true")
    assert all(torch.equal(x, before[name]) for name, x in pd.state_dict().items()) and not pd.persistent[0].held
    assert torch.equal(state, torch.get_rng_state())
    assert pd.causal_importances(batch).lower.keys() == pd.components.keys()
    peak_of_a_step(pd, batch)  # no draw has kept a column without numbers


class Shapeless(nn.Module):
    """What comes out depends on what goes in, but only a model that runs can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[x.sum(-1).nonzero().squeeze(1)]


def test_a_target_that_cannot_run_without_numbers_is_told_without_its_activations():
    pd = ParameterDecomposition(
        target=Shapeless().requires_grad_(False),
        sites={"layer": 3},
        ci_fn=SharedMLP(hidden=[2]),
        losses={"faithfulness": FaithfulnessLoss(coeff=1.0)},
    )
    told = sizes_of(pd, torch.ones(2, 4), precision="32-true")
    assert told.step is None and "persistent sources" not in told.certain
    assert "activations         not known (DynamicOutputShapeException: aten.nonzero" in told.table()


def test_the_table_groups_the_layers_and_stays_short():
    pd, batch = language_model()
    table = sizes_of(pd, batch, precision="32-true").table()
    assert "  h.*.attn.q_proj x 2    linear  32 x 32       24  3,072\n" in table
    assert "  h.*.mlp.c_fc x 2       linear  32 x 128      40  12,800\n" in table
    many = [SiteSize(f"layer{i}.part", "linear", i + 1, 2, 3) for i in range(100)]
    short = Sizes(many, ci_fn=1, target=2, target_bytes=3, parameter_bytes=4, optimizer_bytes=5, step=None, reason="x")
    assert len(short.table().splitlines()) < 40 and "... and 77 more" in short.table()


def test_a_run_that_cannot_fit_is_told_what_it_needs_what_there_is_and_what_helps(monkeypatch: pytest.MonkeyPatch):
    pd, batch = language_model()
    told = sizes_of(pd, batch, precision="32-true")
    needed, together = sum(told.certain.values()), told.together
    runtime = {"accelerator": "cpu", "devices": 1}
    told.check(runtime)
    monkeypatch.setattr(sizes, "memory_of", lambda _: ("NVIDIA T", together, 1))
    told.check(runtime)
    monkeypatch.setattr(sizes, "memory_of", lambda _: ("NVIDIA T", needed, 1))
    expected = "may not fit: with activations a training step needs up to .* NVIDIA T has .*checkpoint_activations=true"
    with pytest.warns(UserWarning, match=expected):
        told.check(runtime)
    monkeypatch.setattr(sizes, "memory_of", lambda _: ("NVIDIA T", needed - 1, 1))
    expected = (
        r"cannot fit: it needs at least \S+ [kM]B \(frozen target \S+ kB, trained parameters .*, persistent sources "
        r"\S+ [kM]B\), activations not counted, and NVIDIA T has .*a smaller C \(pd.sites\).*precision=bf16"
    )
    with pytest.raises(ConfigError, match=expected) as refused:
        told.check(runtime)
    assert "checkpoint_activations" not in str(refused.value), "it helps activations alone"
    monkeypatch.setattr(sizes, "memory_of", lambda _: ("this machine", 2 * needed - 1, 2))
    with pytest.raises(ConfigError, match="for 2 ranks that need as much each"):
        told.check(runtime)
