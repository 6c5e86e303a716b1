"""No step between two logs makes the host wait for a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from host_waits import DEVICE, waits_of
from lightning import LightningModule
from run.conftest import cache, composed  # noqa: F401 -- fixtures
from run.test_language_experiments import documents  # noqa: F401 -- a fixture
from torch import Tensor, nn

from pdlightning import ParameterDecomposition
from pdlightning.build import build_data, build_decomposition, build_target
from pdlightning.data import InductionTokens, ResidualActivationLabels, SparseFeatures
from pdlightning.data.keyed import TOGETHER
from pdlightning.masking import (
    PGD,
    AdamAscent,
    AllSites,
    Bernoulli,
    Binomial,
    Constant,
    EachSite,
    ParticlePool,
    PersistentPGD,
    Routing,
    SGDAscent,
    SignAscent,
    Source,
    Uniform,
    UniformSubset,
)
from pdlightning.metrics import (
    AttentionPatternKL,
    Comparison,
    FaithfulnessLoss,
    HiddenMSE,
    ImportanceMinimalityLoss,
    MergedReconstructionLoss,
    OutputKL,
    OutputMSE,
    ReconstructionLoss,
    SmoothL0Loss,
)
from pdlightning.modules import GlobalTransformer
from pdlightning.optimization import AdamW, FaithfulnessWarmup
from pdlightning.rehearsal.rehearse import blank_target
from pdlightning.schedules import Anneal, Schedule
from pdlightning.targets import InductionTransformer
from pdlightning.targets.language.training import LanguageModelTraining
from pdlightning.targets.training import TargetTraining


def recon(source: Source, routing: Routing, comparison: Comparison, **arguments: Any) -> ReconstructionLoss:
    return ReconstructionLoss(
        **{"coeff": 0.5, "source": source, "routing": routing, "comparison": comparison, **arguments}
    )


def persistent(scope: str, ascent: Any, **arguments: Any) -> PersistentPGD:
    return PersistentPGD(optimizer=ascent, scope=scope, **{"n_warmup": 2, **arguments})  # type: ignore[arg-type]


def everything() -> ParameterDecomposition:
    """Every source, ascent, routing, comparison and penalty, an embedding among the sites, schedules and clipping."""
    mse, kl, falling = OutputMSE(), OutputKL(), Schedule(start=0.05, kind="cosine", final_frac=0.1)
    adam = AdamAscent(lr=falling, betas=(0.5, 0.99))
    patterns = AttentionPatternKL(n_heads=2, rope_base=None, q="layers.*.attn.q_proj", k="layers.*.attn.k_proj")
    fresh: dict[str, Any] = dict(n_steps=2, step_size=0.1, init="random")
    losses = {
        "faithfulness": FaithfulnessLoss(coeff=1.0),
        "relative": FaithfulnessLoss(coeff=1.0, form="relative"),
        "lp": ImportanceMinimalityLoss(coeff=falling, p=Anneal(start=2.0, end=0.5), beta=0.5, ema_halflife=3.0),
        "smooth_l0": SmoothL0Loss(coeff=1e-3, gamma=Anneal(start=1.0, end=0.1), normalised=True, reference_count=2),
        "uniform": recon(Uniform(), UniformSubset(), kl),
        "binomial": recon(Binomial(), EachSite(), mse),
        "ci": recon(Constant(value=0.0), AllSites(), HiddenMSE()),
        "patterns": recon(Constant(value=0.5), Bernoulli(p=0.6), patterns),
        "measured": recon(Constant(value=1.0), AllSites(), kl, coeff=0.0),
        "pgd": recon(PGD(scope="per_position", **fresh), UniformSubset(), kl),
        "shared pgd": recon(PGD(scope="shared", **fresh), AllSites(), HiddenMSE()),
        "by sample": recon(persistent("per_sample_per_position", adam), AllSites(), kl, coeff=falling),
        "single": recon(persistent("single", SignAscent(lr=0.1)), UniformSubset(), kl),
        "by position": recon(persistent("per_position_shared_batch", SGDAscent(lr=falling)), AllSites(), HiddenMSE()),
        "repeated": recon(persistent("repeat", SignAscent(lr=0.1), n_sources=2), AllSites(), kl),
        "sigmoid": recon(persistent("single", SGDAscent(lr=1.0), parameterisation="sigmoid"), Bernoulli(p=0.5), mse),
        "pool": recon(ParticlePool(n_particles=3, optimizer=adam, n_warmup=1), UniformSubset(), kl),
        "merged": MergedReconstructionLoss(
            coeff=0.5, p=0.5, adversary=persistent("per_sample_per_position", AdamAscent(lr=0.01, betas=(0.01, 0.99))),
            adversary_routing=AllSites(), stochastic=Uniform(), stochastic_routing=UniformSubset(), comparison=kl,
        ),
    }  # fmt: skip
    target = InductionTransformer(vocab=11, length=8, d_model=8, n_layers=1, n_heads=2, seed=0).requires_grad_(False)
    settings = AdamW(lr=falling, clip=0.3, weight_decay=0.1)
    return ParameterDecomposition(
        target=target, sites={"embed": 3, "layers.*.attn.*_proj": 3}, losses=losses, components_optimizer=settings,
        ci_optimizer=settings, faithfulness_warmup=FaithfulnessWarmup(steps=2),
        ci_fn=GlobalTransformer(d_model=8, n_blocks=1, n_heads=2, mlp_hidden=[8]),
    )  # fmt: skip


def tokens() -> InductionTokens:
    return InductionTokens(vocab=11, length=8, prefix_window=4, batch_size=4, eval_batches=1, seed=0)


def test_no_part_of_a_step_waits() -> None:
    assert waits_of(everything(), tokens()) == []


@pytest.mark.parametrize("chosen", [{"synced": [[0, 1]]}, {"generation": "exactly_two", "probability": None}])
def test_no_draw_of_sparse_features_waits(chosen: dict[str, Any]) -> None:
    settings: dict[str, Any] = dict(n_features=3, batch_size=4, generation="at_least_zero", probability=0.5)
    labels = ResidualActivationLabels(n_features=3, activation="gelu", coefficient_range=(1.0, 2.0), seed=0)
    data = SparseFeatures(**settings | chosen, eval_batches=1, seed=0, value_range=(0.0, 1.0), labels=labels)
    assert waits_of(training_with(lambda x: x), data, steps=TOGETHER + 3) == []


def with_text(config: dict[str, Any], text: Path) -> None:
    """Text and tokenizer of a test, in the place of those that take a minute."""
    for data in (config["data"], config["target"].get("data", {})):
        if "corpus" in data:
            data["corpus"] = {
                "_target_": "pdlightning.data.LocalFiles", "format": "json", "column": "text",
                "train": [str(text)], "eval_fraction": 0.2,
            }  # fmt: skip
            data |= {"tokenizer": {"_target_": "pdlightning.data.TrainedTokenizer", "vocab_size": 300}}
            data |= {"n_ctx": 16, "batch_size": 4, "eval_batches": 1}


@pytest.fixture
def shipped(
    composed: Callable[..., dict[str, Any]],  # noqa: F811
    documents: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], dict[str, Any]]:
    """The config of an experiment as it is shipped, with a text that is quickly read."""

    def make(experiment: str) -> dict[str, Any]:
        monkeypatch.setenv("PDLIGHTNING_CACHE", str(tmp_path))
        config = composed(f"experiment={experiment}")
        with_text(config, documents)
        return config

    return make


@pytest.mark.parametrize("experiment", ["tms_5-2", "resid_mlp3", "lm_tiny"])
def test_no_step_of_an_experiment_waits(shipped: Callable[[str], dict[str, Any]], experiment: str) -> None:
    config = shipped(experiment)
    config["pd"]["faithfulness_warmup"]["steps"] = 2
    decomposition = build_decomposition(config, blank_target(build_target(config)))
    assert waits_of(decomposition, build_data(config)) == []


@pytest.mark.parametrize("experiment", ["tms_5-2", "resid_mlp3", "induction", "lm_tiny"])
def test_no_step_of_a_targets_training_waits(shipped: Callable[[str], dict[str, Any]], experiment: str) -> None:
    recipe: Any = build_target(shipped(experiment))
    common = dict(model=recipe.model(seed=0), steps=3, lr=recipe.lr, warmup_frac=0.5, weight_decay=recipe.weight_decay)
    if experiment == "lm_tiny":
        training: LightningModule = LanguageModelTraining(
            **common, final_frac=recipe.final_frac, clip=recipe.clip, micro_batches=2
        )
    else:
        training = TargetTraining(**common, loss=recipe.loss, schedule=recipe.schedule)
    assert waits_of(training, recipe.data(seed=0)) == []


class Waiting(nn.Module):
    """A linear layer beside which something else is done."""

    def __init__(self, act: Callable[[Tensor], Any]):
        super().__init__()
        self.linear, self.act = nn.Linear(3, 3), act

    def forward(self, x: Tensor) -> Tensor:
        self.act(x)
        return self.linear(x)


def training_with(act: Callable[[Tensor], Any]) -> TargetTraining:
    return TargetTraining(
        model=Waiting(act), loss=nn.functional.mse_loss, steps=3, lr=1e-3, schedule="constant", warmup_frac=0.0,
        weight_decay=0.0,
    )  # fmt: skip


class Pairs:
    """Batches without end, of one device."""

    def __init__(self, device: torch.device):
        self.device = device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.ones(4, 3, device=self.device), torch.ones(4, 3, device=self.device)


COPIES: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: torch.tensor(3.0, device=x.device),
    "a list": lambda x: x.new_tensor([1.0, 2.0]),
    "to": lambda x: torch.arange(3).to(x.device),
    "copy_": lambda x: torch.empty_like(x).copy_(torch.ones(4, 3)),
    "fill by a copy": lambda x: torch.empty_like(x[0, 0]).copy_(torch.tensor(1.0)),
    "promised, not pinned": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "pinned, not promised": lambda x: torch.ones(3).pin_memory().to(x.device),
    "a list of places": lambda x: x[[0, 1]],
    "places on the host": lambda x: x.index_select(0, torch.tensor([0]).to(x.device)),
    "a masked write of several": lambda x: torch.empty_like(x).index_put_((x > 0,), x.flatten()),
}
READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.detach().numpy(),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: x.equal(x + 1),
    "allclose": lambda x: x.allclose(x + 1),
    "in": lambda x: 1.0 in x,
    "bincount": lambda x: x.flatten().long().bincount(),
    "repeated by a tensor": lambda x: x.repeat_interleave(x[:, 0].long(), dim=0),
    "a place": lambda x: x[x[0, 0].long()],
    "a number of an operation": lambda x: torch.full((2,), x.sum(), device=x.device),  # type: ignore[arg-type]
    "a length": lambda x: torch.arange(x.sum(), device=x.device),  # type: ignore[arg-type]
}
HARMLESS: dict[str, Callable[[Tensor], Any]] = {
    "a fill": lambda x: torch.empty_like(x).fill_(3.0),
    "full": lambda x: torch.full((), 3.0, device=x.device),
    "a number as an argument": lambda x: torch.where(x > 0, x * torch.tensor(3.0), 1.0) + 2.0,
    "pinned and promised": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "a masked write of one": lambda x: torch.empty_like(x).index_put_((x > 0,), x[0, 0]),
    "places on the device": lambda x: x[torch.arange(2, device=x.device)],
}


@pytest.mark.parametrize("what", COPIES)
def test_a_copy_from_the_host_is_seen(what: str) -> None:
    found = waits_of(training_with(COPIES[what]), Pairs(DEVICE))
    assert len(found) == 2  # once a step, from the second of three on
    assert all(wait.startswith(Path(__file__).name) for wait in found)


@pytest.mark.parametrize("what", READS)
def test_a_number_that_is_asked_for_is_seen(what: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match="(?i)meta"):
        waits_of(training_with(READS[what]), Pairs(DEVICE))


@pytest.mark.parametrize("what", HARMLESS)
def test_what_makes_nobody_wait_is_passed(what: str) -> None:
    assert waits_of(training_with(HARMLESS[what]), Pairs(DEVICE)) == []


def test_batches_of_the_host_are_seen() -> None:
    assert len(waits_of(training_with(lambda x: x), Pairs(torch.device("cpu")))) == 2 * 2
