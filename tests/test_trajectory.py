"""Twenty optimizer steps through a real Trainer are the oracle's, loss for loss and weight for weight (spec 6)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import lightning
import naive
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from parity import (
    CI_FUNCTIONS,
    COMPARISONS,
    ROUTINGS,
    SEED,
    SQUASHINGS,
    TOKEN_SITES,
    VECTOR_SITES,
    batch_of,
    in_oracle_layout,
    oracle_leaves,
    oracle_of,
    source_of,
    term_of,
    tokens_chain,
    vectors_chain,
)
from torch import Tensor

from pdlightning import ParameterDecomposition
from pdlightning.functional import derivatives
from pdlightning.metrics import FaithfulnessLoss, ImportanceMinimalityLoss, Loss, ReconstructionLoss
from pdlightning.optimization import AdamW, FaithfulnessWarmup
from pdlightning.schedules import Anneal, Schedule

STEPS, BATCH = 20, 3

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def as_in_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed again above a size is so here. Elsewhere the oracle meets models below it."""
    monkeypatch.setattr(derivatives, "LARGE", 1)


class History(Callback):
    """The logged losses of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        logged = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("loss/")}
        self.rows.append({name.removeprefix("loss/"): value for name, value in logged.items()})


def recon(source: str, routing: str, comparison: str, *, coeff: Any = 1.0, delta: bool = True) -> Loss:
    made = source_of(source, delta=delta)
    return ReconstructionLoss(coeff=coeff, source=made, routing=ROUTINGS[routing], comparison=COMPARISONS[comparison])


COEFF = {"start": 0.7, "kind": "cosine", "warmup_frac": 0.2, "final_frac": 0.1}
LR = {"start": 2e-2, "kind": "cosine", "warmup_frac": 0.1, "final_frac": 0.1}
P = {"start_frac": 0.1, "end_frac": 0.8}
WARMUP: dict[str, Any] = {"steps": 5, "lr": 1e-2, "weight_decay": 0.1, "form": "mean_squared"}


def losses() -> dict[str, Loss]:
    return {
        "faithfulness": FaithfulnessLoss(coeff=1.5),
        "importance": ImportanceMinimalityLoss(coeff=0.1, p=Anneal(start=2.0, end=0.6, **P), beta=0.3),
        "stochastic": recon("uniform", "all", "mse", coeff=Schedule(**COEFF)),  # type: ignore[arg-type]
        "layerwise": recon("uniform", "each_site", "hidden", coeff=0.5),
        "subset": recon("uniform", "uniform_subset", "kl", coeff=0.5),
        "attacked": recon("pgd:random:shared", "uniform_subset", "kl", coeff=0.5),
        "unmasked": recon("constant:1", "all", "mse", coeff=0.0),
    }


def oracle_terms() -> dict[str, naive.Config]:
    importance = {"phi": "lp", "beta": 0.3, "reference_count": None, "p": {"p_start": 2.0, "p_end": 0.6, **P}}
    return {
        "faithfulness": {"kind": "faithfulness", "coeff": 1.5, "form": "mean_squared"},
        "importance": {"kind": "importance_minimality", "coeff": 0.1, **importance},
        "stochastic": term_of("uniform", "all", "mse") | {"coeff": COEFF},
        "layerwise": term_of("uniform", "each_site", "hidden") | {"coeff": 0.5},
        "subset": term_of("uniform", "uniform_subset", "kl") | {"coeff": 0.5},
        "attacked": term_of("pgd:random:shared", "uniform_subset", "kl") | {"coeff": 0.5},
        "unmasked": term_of("constant:1", "all", "mse") | {"coeff": 0.0},
    }


@pytest.mark.parametrize(
    ("data", "ci", "leading"),
    [("vectors", "scalar_mlp", (BATCH,)), ("tokens", "shared_mlp", (BATCH, 2)), ("vectors", "global_mlp", (BATCH, 2))],
)
def test_a_training_equals_the_oracle_step_by_step(data: str, ci: str, leading: tuple[int, ...]) -> None:
    target, sites = {"vectors": (vectors_chain, VECTOR_SITES), "tokens": (tokens_chain, TOKEN_SITES)}[data]
    pd = ParameterDecomposition(
        target=target(),
        sites=sites,
        ci_fn=CI_FUNCTIONS[ci](hidden=[3]),
        losses=losses(),
        components_optimizer=AdamW(lr=Schedule(**LR), clip=0.3),  # type: ignore[arg-type]
        ci_optimizer=AdamW(lr=1e-2, clip=0.05),
        faithfulness_warmup=FaithfulnessWarmup(**WARMUP),
        seed=SEED,
    )
    batches = [batch_of(data, leading, seed=step) for step in range(STEPS)]
    oracle = oracle_of(copy.deepcopy(pd.model))
    frozen = copy.deepcopy(pd.target.state_dict())

    history = History()
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, callbacks=[history],
    )  # fmt: skip
    trainer.fit(pd, _Loader(batches))

    config = {
        "seed": SEED, "steps": STEPS, "sampling": "continuous", "terms": oracle_terms(), **SQUASHINGS["leaky_hard"],
        "lr_components": LR, "lr_ci": 1e-2, "clip_components": 0.3, "clip_ci": 0.05, "faithfulness_warmup": WARMUP,
    }  # fmt: skip
    rows, *trained = naive.trajectory(*oracle, [(batch, range(BATCH)) for batch in batches], config)

    assert len(history.rows) == STEPS
    for step, (ours, theirs) in enumerate(zip(history.rows, rows, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-10, abs=1e-10), f"losses of step {step}"
    for ours, theirs in zip(in_oracle_layout(pd.model), oracle_leaves(*trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for (name, before), after in zip(frozen.items(), pd.target.state_dict().values(), strict=True):
        assert name.startswith("components") or ".components." in name or torch.equal(before, after), name


class _Loader:
    """The batches as they are."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
