"""Persistent sources follow the oracle through whole trainings: losses, sources and weights (spec L6)."""

from __future__ import annotations

import copy

import naive
import pytest
from adversaries import (
    BATCH,
    COMMON,
    MERGED,
    STEPS,
    TERMS,
    Loader,
    Rows,
    assert_same_sources,
    config_of,
    decomposition,
    oracle_config,
    quiet,
    sources_of,
)
from parity import assert_same, batch_of, in_oracle_layout, oracle_leaves, oracle_of

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(
    ("data", "leading", "names"),
    [
        ("vectors", (BATCH,), list(TERMS)[0::3]),
        ("vectors", (BATCH, 2), list(TERMS)[1::3]),
        ("tokens", (BATCH, 2), list(TERMS)[2::3]),
        ("tokens", (BATCH,), list(TERMS)[0::4]),
        ("vectors", (BATCH, 2), list(TERMS)[1::4]),
        ("tokens", (BATCH, 2), list(TERMS)[2::4]),
        ("vectors", (BATCH,), list(TERMS)[3::4]),
    ],
)
def test_a_training_equals_the_oracle_in_losses_sources_and_weights(
    data: str, leading: tuple[int, ...], names: list[str]
) -> None:
    terms = config_of(names)
    # A ci function that reads x V shares it with the first masked forward, so with a warmup.
    pd = decomposition(terms, data, ci="scalar_mlp" if len(leading) == 1 else "shared_mlp")
    batches = [batch_of(data, leading, seed=step) for step in range(STEPS)]
    if data == "vectors":
        for step, batch in enumerate(batches):
            batch[step % BATCH] = 0.0  # such samples are moved to the end, and must still meet their own source
    oracle, history, adversaries = oracle_of(copy.deepcopy(pd.model)), Rows(), {}
    quiet(STEPS, callbacks=[history]).fit(pd, Loader(batches))
    rows, *trained = naive.trajectory(*oracle, [(b, range(BATCH)) for b in batches], oracle_config(terms), adversaries)
    for step, (ours, theirs) in enumerate(zip(history.rows, rows, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-10, abs=1e-10), f"losses of step {step}"
    for name in names:
        assert_same_sources(pd, name, adversaries[name])
    for ours, theirs in zip(in_oracle_layout(pd.model), oracle_leaves(*trained), strict=True):
        assert_same(ours, theirs, "weights")


@pytest.mark.parametrize("leading", [(), (2,)])
def test_accumulated_micro_batches_are_one_batch(leading: tuple[int, ...]) -> None:
    terms = config_of(["sign single", "adam shared"])
    terms["repeat"] = COMMON | {"scope": "repeat", "n_sources": 2, "n_warmup": 0, "routing": "uniform_subset"}
    terms["merged"] = COMMON | MERGED | {"scope": "single", "n_warmup": 0}
    whole, parts = decomposition(terms), decomposition(terms)
    batches = [batch_of("vectors", (BATCH, *leading), seed=step) for step in range(3)]
    quiet(3).fit(whole, Loader(batches))
    quiet(3, accumulate_grad_batches=2).fit(parts, Loader(half for batch in batches for half in batch.split(2)))
    for name in terms:
        for key, value in sources_of(whole, name).items():
            assert_same(sources_of(parts, name)[key], value, f"{name} {key}")
    for ours, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        assert_same(ours, theirs)
