"""Trainings with persistent adversaries, in the package's words and in the oracle's."""

from __future__ import annotations

from typing import Any

import lightning
import naive
from parity import (
    CI_FUNCTIONS,
    COMPARISONS,
    ROUTINGS,
    SEED,
    SQUASHINGS,
    TOKEN_SITES,
    VECTOR_SITES,
    assert_same,
    tokens_chain,
    vectors_chain,
)
from torch import Tensor

from pdlightning import ParameterDecomposition
from pdlightning.masking import (
    AdamAscent,
    Ascent,
    ParticlePool,
    PersistentPGD,
    SGDAscent,
    SignAscent,
    Uniform,
)
from pdlightning.masking.persistent import held_key
from pdlightning.metrics import (
    FaithfulnessLoss,
    ImportanceMinimalityLoss,
    Loss,
    MergedReconstructionLoss,
    ReconstructionLoss,
)
from pdlightning.optimization import AdamW
from pdlightning.schedules import Schedule

STEPS, BATCH = 6, 4
LR = {"start": 0.08, "kind": "cosine", "warmup_frac": 0.34, "final_frac": 0.2}
SCHEDULED = {"start": 0.9, "kind": "linear", "warmup_frac": 0.34, "final_frac": 0.3}  # 0 at the first step
COMMON: naive.Config = {
    "kind": "reconstruction", "source": "persistent_pgd", "coeff": 0.7, "optimizer": "adam", "lr": 0.05,
    "betas": (0.5, 0.99), "eps": 1e-3, "scope": "per_sample_per_position", "n_sources": None, "n_particles": None,
    "n_warmup": 2, "init": "random", "parameterisation": "clamp", "delta": True, "routing": "all", "comparison": "mse",
    "bernoulli_p": 0.6,
}  # fmt: skip
MERGED = {"kind": "merged", "p": 0.5, "stochastic_routing": "uniform_subset"}
TERMS: dict[str, naive.Config] = {
    "sign single": {"optimizer": "sign", "lr": 0.05, "scope": "single", "n_warmup": 0},
    "sign by sample": {"optimizer": "sign", "lr": LR, "routing": "uniform_subset", "comparison": "kl"},
    "sign repeated": {"optimizer": "sign", "scope": "repeat", "n_sources": 2, "routing": "bernoulli", "delta": False},
    "sgd shared": {"optimizer": "sgd", "lr": 3.0, "scope": "per_position_shared_batch", "routing": "uniform_subset"},
    "sgd sigmoid": {"optimizer": "sgd", "lr": 20.0, "parameterisation": "sigmoid", "n_warmup": 1, "comparison": "kl"},
    "adam by sample": {"lr": LR, "comparison": "kl", "coeff": SCHEDULED},
    "adam single": {"scope": "single", "parameterisation": "sigmoid", "routing": "uniform_subset"},
    "adam shared": {"scope": "per_position_shared_batch", "n_warmup": 0, "init": "zeros", "comparison": "hidden"},
    "adam repeated": {"scope": "repeat", "n_sources": 4, "comparison": "kl", "routing": "each_site", "n_warmup": 1},
    "only measured": {"coeff": 0.0, "scope": "single"},
    "pool": {"scope": "pool", "n_particles": 3, "routing": "uniform_subset", "comparison": "kl", "lr": LR},
    "sign pool": {"scope": "pool", "n_particles": 2, "optimizer": "sign", "n_warmup": 0, "parameterisation": "sigmoid"},
    "merged": MERGED | {"betas": (0.01, 0.99), "lr": 0.01, "comparison": "kl"},
    "merged pool": MERGED | {"scope": "pool", "n_particles": 2, "p": 0.4},
    "merged single": MERGED | {"scope": "single", "optimizer": "sgd", "lr": 5.0, "routing": "bernoulli", "n_warmup": 1},
}  # fmt: skip
ASCENTS: dict[str, type[Any]] = {"sign": SignAscent, "sgd": SGDAscent, "adam": AdamAscent}


def number(value: Any) -> Any:
    return Schedule(**value) if isinstance(value, dict) else value


def ascent_of(term: naive.Config) -> Ascent:
    extra = {"betas": term["betas"], "eps": term["eps"]} if term["optimizer"] == "adam" else {}
    return ASCENTS[term["optimizer"]](lr=number(term["lr"]), **extra)


def source_of(term: naive.Config) -> PersistentPGD:
    common = {name: term[name] for name in ("n_warmup", "init", "parameterisation", "delta")}
    if term["scope"] == "pool":
        return ParticlePool(n_particles=term["n_particles"], optimizer=ascent_of(term), **common)
    return PersistentPGD(optimizer=ascent_of(term), scope=term["scope"], n_sources=term["n_sources"], **common)


def loss_of(term: naive.Config) -> Loss:
    source, routing = source_of(term), ROUTINGS[term["routing"]]
    coeff, comparison = number(term["coeff"]), COMPARISONS[term["comparison"]]
    if term["kind"] == "merged":
        return MergedReconstructionLoss(
            coeff=coeff, p=term["p"], adversary=source, adversary_routing=routing, stochastic=Uniform(),
            stochastic_routing=ROUTINGS[term["stochastic_routing"]], comparison=comparison,
        )  # fmt: skip
    return ReconstructionLoss(coeff=coeff, source=source, routing=routing, comparison=comparison)


def config_of(names: list[str]) -> dict[str, naive.Config]:
    return {name: COMMON | TERMS[name] for name in names}


def decomposition(
    terms: dict[str, naive.Config], data: str = "vectors", *, ci: str = "shared_mlp", **arguments: Any
) -> ParameterDecomposition:
    target, sites = {"vectors": (vectors_chain, VECTOR_SITES), "tokens": (tokens_chain, TOKEN_SITES)}[data]
    losses = {
        "faithfulness": FaithfulnessLoss(coeff=1.5),
        "importance": ImportanceMinimalityLoss(coeff=0.1, p=1.5),
        **{name: loss_of(term) for name, term in terms.items()},
    }
    settings = AdamW(lr=2e-2, clip=0.3)
    return ParameterDecomposition(
        target=target(), sites=sites, ci_fn=CI_FUNCTIONS[ci](hidden=[3]), losses=losses, components_optimizer=settings,
        ci_optimizer=settings, seed=SEED, **arguments,
    )  # fmt: skip


def oracle_config(terms: dict[str, naive.Config]) -> naive.Config:
    importance = {"phi": "lp", "p": 1.5, "beta": 0.0, "reference_count": None}
    plain: dict[str, naive.Config] = {
        "faithfulness": {"kind": "faithfulness", "coeff": 1.5, "form": "mean_squared"},
        "importance": {"kind": "importance_minimality", "coeff": 0.1, **importance},
    }
    return {
        "seed": SEED, "steps": STEPS, "sampling": "continuous", "terms": {**plain, **terms}, "lr_components": 2e-2,
        "lr_ci": 2e-2, "clip_components": 0.3, "clip_ci": 0.3, "faithfulness_warmup": None, **SQUASHINGS["leaky_hard"],
    }  # fmt: skip


def quiet(steps: int, **arguments: Any) -> lightning.Trainer:
    return lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, inference_mode=False, **arguments,
    )  # fmt: skip


class Loader(list[Any]):
    """Batches as they are: of a plain list Lightning would make one loader each."""


class Rows(lightning.Callback):
    """The logged losses of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.rows.append({k[5:]: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("loss/")})


def sources_of(pd: ParameterDecomposition, name: str) -> dict[str, Tensor]:
    source = pd.terms[name].source  # type: ignore[attr-defined]
    return {key: held.value for key, held in source.held.items()}


def assert_same_sources(pd: ParameterDecomposition, name: str, state: naive.Persistent) -> None:
    ours = sources_of(pd, name)
    assert len(ours) == len(state.sources) + len(state.deltas)
    for s, r in state.sources.items():
        assert_same(ours[held_key(s, "source")], r, f"{name}: source of {s}")
    for s, r in state.deltas.items():
        assert_same(ours[held_key(s, "delta")].squeeze(-1), r, f"{name}: delta source of {s}")
