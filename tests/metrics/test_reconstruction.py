"""Every source x routing x comparison equals the oracle, in value and in gradient (spec 4)."""

from __future__ import annotations

import naive
import pytest
import torch
from parity import (
    CI_FUNCTIONS,
    COMPARISONS,
    ROUTINGS,
    STEP,
    assert_same,
    assert_same_value_and_gradients,
    batch_of,
    built,
    observed,
    oracle_config,
    oracle_of,
    source_of,
    term_of,
)

from pdlightning.masking import PGD
from pdlightning.metrics import ReconstructionLoss

SOURCES = ["uniform", "binomial", "constant:0", "constant:1", "constant:0.3"]
SOURCES += [f"pgd:{init}:{scope}" for init in ("random", "ones", "zeros") for scope in ("per_position", "shared")]
ROUTING_NAMES, COMPARISON_NAMES = list(ROUTINGS), list(COMPARISONS)

pytestmark = pytest.mark.usefixtures("float64")


def loss_of(source: str, routing: str, comparison: str, *, delta: bool = True) -> ReconstructionLoss:
    loss = ReconstructionLoss(
        coeff=1.0, source=source_of(source, delta=delta), routing=ROUTINGS[routing], comparison=COMPARISONS[comparison]
    )
    loss.term = "term"
    return loss


def check(
    source: str,
    routing: str,
    comparison: str,
    data: str,
    leading: tuple[int, ...],
    *,
    delta: bool = True,
    ci: str = "shared_mlp",
) -> None:
    # From ones the whole delta is in place, the output is the target's, and rounding would decide where to climb.
    delta = delta and not source.startswith("pgd:ones")
    model, batch = built(data, ci=ci), batch_of(data, leading)
    target, ci_fn = oracle_of(model)
    config = oracle_config({"term": term_of(source, routing, comparison, delta=delta)})
    values, _ = naive.step_losses(target, ci_fn, batch, range(leading[0]), STEP, config)
    total, count = loss_of(source, routing, comparison, delta=delta).measure(observed(model, batch))
    assert_same_value_and_gradients(model, total / count, values["term"], target, ci_fn)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("routing", ROUTING_NAMES)
@pytest.mark.parametrize("comparison", COMPARISON_NAMES)
def test_vectors_with_one_leading_axis(source: str, routing: str, comparison: str) -> None:
    check(source, routing, comparison, "vectors", (3,))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("routing", ROUTING_NAMES)
def test_tokens_with_two_leading_axes_through_every_kind_of_site(source: str, routing: str) -> None:
    i = SOURCES.index(source) + ROUTING_NAMES.index(routing)
    check(source, routing, COMPARISON_NAMES[i % 3], "tokens", (2, 2))


@pytest.mark.parametrize("source", SOURCES)
def test_vectors_with_two_leading_axes_and_tokens_with_one(source: str) -> None:
    i = SOURCES.index(source)
    check(source, ROUTING_NAMES[i % 4], COMPARISON_NAMES[i % 3], "vectors", (2, 2))
    check(source, ROUTING_NAMES[(i + 1) % 4], COMPARISON_NAMES[(i + 1) % 3], "tokens", (3,))


@pytest.mark.parametrize("source", ["uniform", "binomial", "pgd:random:per_position", "pgd:ones:shared"])
@pytest.mark.parametrize("routing", ROUTING_NAMES)
def test_without_the_delta(source: str, routing: str) -> None:
    check(source, routing, "mse", "tokens", (3,), delta=False)


@pytest.mark.parametrize("ci", list(CI_FUNCTIONS))
@pytest.mark.parametrize("source", ["uniform", "pgd:random:shared"])
def test_through_every_ci_function(ci: str, source: str) -> None:
    check(source, "uniform_subset", "kl", "tokens", (2, 2), ci=ci)


@pytest.mark.parametrize(
    ("routing", "comparison", "count"),
    [("all", "mse", 4 * 3), ("all", "kl", 4), ("all", "hidden", 4 * (2 + 3)), ("each_site", "mse", 2 * 4 * 3)]
    + [("each_site", "kl", 2 * 4), ("uniform_subset", "kl", 4), ("each_site", "hidden", 2 * 4 * 5)],
)
def test_counts_are_of_elements_or_positions_and_add_over_forwards(routing: str, comparison: str, count: int) -> None:
    """The chain 3 -> 2 -> 3 at 2 x 2 positions."""
    assert loss_of("uniform", routing, comparison).measure(observed(built(), batch_of("vectors", (2, 2))))[1] == count


@pytest.mark.parametrize("source", [s for s in SOURCES if not s.endswith("shared")])
@pytest.mark.parametrize("routing", ROUTING_NAMES)
def test_two_parts_of_a_batch_give_the_value_of_the_whole(source: str, routing: str) -> None:
    """A shared adversary is left out: it attacks each batch as one."""
    model, batch = built(), batch_of("vectors", (8,))
    for comparison in COMPARISON_NAMES if source == "uniform" else ["mse"]:
        whole, parts = loss_of(source, routing, comparison), loss_of(source, routing, comparison)
        whole.update(observed(model, batch))
        parts.update(observed(model, batch[:3]))
        parts.update(observed(model, batch[3:], first=3))
        assert_same(parts.compute(), whole.compute())
        assert whole.count == parts.count


def test_an_adversary_that_starts_from_ones_with_the_whole_delta_starts_at_the_target() -> None:
    model, batch = built(), batch_of("vectors", (4,))
    start = PGD(n_steps=0, step_size=0.1, init="ones", scope="shared")
    loss = ReconstructionLoss(coeff=1.0, source=start, routing=ROUTINGS["all"], comparison=COMPARISONS["mse"])
    assert loss.measure(observed(model, batch))[0].item() < 1e-20


def test_a_target_that_is_perfectly_decomposed_has_no_loss() -> None:
    model = built()
    with torch.no_grad():
        for c in model.components.values():
            u, s, v = torch.linalg.svd(c.target_weight, full_matrices=False)
            c.V.zero_()[:, : len(s)] = v.T * s
            c.U.zero_()[: len(s)] = u.T
    total, _ = loss_of("constant:1", "all", "mse").measure(observed(model, batch_of("vectors", (4,))))
    assert total.item() < 1e-20


def test_the_clean_side_is_detached_and_the_metric_keeps_no_graph() -> None:
    loss, observation = loss_of("uniform", "all", "mse"), observed(built(), batch_of("vectors", (4,)))
    assert not observation.clean.output.requires_grad
    loss.update(observation)
    assert not loss.compute().requires_grad
