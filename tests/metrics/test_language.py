"""Evaluations on tokens: CE and KL under six maskings, and who fires where (spec E1, E2)."""

from __future__ import annotations

import math
from typing import Any

import naive
import pytest
import torch
from parity import SEED, STEP, Chain, assert_same, frozen, observed, oracle_of, seeded
from torch import Tensor, nn

from pdlightning.metrics import ActiveSubcomponents, CEandKL, Evaluation, OutputMSE, PGDLadder
from pdlightning.metrics.figures import L0ByPositionFigure
from pdlightning.metrics.language import next_tokens
from pdlightning.modules import ComponentModel, SharedMLP
from pdlightning.observation import observe

pytestmark = pytest.mark.usefixtures("float64")
VOCAB = 5
MASKINGS = ("ci", "unmasked", "stochastic", "random", "rounded_0.4", "zero")


def model_of_tokens(**changes: Any) -> ComponentModel:
    """Token -> 3 -> logits of the next token; ci spread over [0, 1]."""
    target = frozen(Chain({"embed": nn.Embedding(VOCAB, 3), "out": nn.Linear(3, VOCAB)}))
    settings: dict[str, Any] = {"target": target, "sites": {"embed": 4, "out": 3}, "ci_fn": SharedMLP(hidden=[3])}
    model = ComponentModel(**settings, **changes, seed=SEED)
    with torch.no_grad():
        for i, parameter in enumerate(model.ci_fn.parameters()):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=seeded(i)))
    return model


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=seeded(seed))


def ce_kl(model: ComponentModel, *parts: tuple[Tensor, int], term: str = "ce_kl") -> dict[str, Tensor]:
    metric = CEandKL(threshold=0.4)
    metric.term = term
    metric.prepare(model)
    with torch.no_grad():
        for batch, first in parts:
            metric.update(observed(model, batch, first=first))
    return metric.compute()  # type: ignore[return-value]


def test_every_masking_equals_the_oracle() -> None:
    model, batch = model_of_tokens(), rows(3, 4)
    target, _ = oracle_of(model)
    found = ce_kl(model, (batch, 0))
    lower = {s: x.detach() for s, x in observed(model, batch).ci.lower.items()}
    assert all(((x > 0.4).any() and (x <= 0.4).any()) for x in lower.values()), "rounding both ways"
    draws = naive.Draws(SEED, STEP, (0, 1, 2), (4,))
    expected = naive.ce_and_kl(target, batch, lower, draws, "ce_kl", 0.4)
    expected = {name.replace("rounded", "rounded_0.4"): value for name, value in expected.items()}
    assert expected.pop("ce_unrecovered_zero") == 1
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-10)
    assert found.keys() == {
        "ce_target", *(f"{what}_{m}" for what in ("kl", "ce", "ce_difference") for m in MASKINGS),
        *(f"ce_unrecovered_{m}" for m in MASKINGS[:-1]),
    }  # fmt: skip


def test_unequal_parts_of_a_batch_give_the_value_of_the_whole() -> None:
    model, batch = model_of_tokens(), rows(8, 4)
    whole, parts = ce_kl(model, (batch, 0)), ce_kl(model, (batch[:3], 0), (batch[3:], 3))
    for name in whole:
        assert_same(parts[name], whole[name], name)


def test_rows_of_unequal_length_weigh_by_their_labels() -> None:
    model = model_of_tokens()
    short, long = rows(2, 3), rows(2, 9, seed=1)
    found = ce_kl(model, (short, 0), (long, 2))["ce_target"]
    a, b = (ce_kl(model, (part, 0))["ce_target"] for part in (short, long))
    assert_same(found, (2 * 2 * a + 2 * 8 * b) / (2 * 2 + 2 * 8))


def successor() -> ComponentModel:
    """A target that knows one thing: after token i comes i + 1."""
    embed, out = nn.Embedding(VOCAB, VOCAB), nn.Linear(VOCAB, VOCAB, bias=False)
    with torch.no_grad():
        embed.weight.copy_(torch.eye(VOCAB))
        out.weight.copy_(50 * torch.roll(torch.eye(VOCAB), 1, dims=0))
    target = Chain({"embed": embed, "out": out}).requires_grad_(False)
    return ComponentModel(target=target, sites={"out": VOCAB}, ci_fn=SharedMLP(hidden=[2]))


def test_no_label_crosses_a_row() -> None:
    batch = torch.tensor([[0, 1, 2], [0, 1, 2], [3, 4, 0]])  # what follows a row is not its successor
    found = ce_kl(successor(), (batch, 0))
    assert float(found["ce_target"]) < 1e-20
    assert float(found["ce_zero"]) == pytest.approx(math.log(VOCAB)), "no subcomponent, no bias: every token alike"
    assert float(found["kl_zero"]) == pytest.approx(math.log(VOCAB))


def test_labels_of_every_kind_of_batch() -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    shifted = [[2, 3, 4, -100], [3, 2, 1, -100]]
    assert next_tokens(tokens).tolist() == shifted
    assert next_tokens((tokens, torch.zeros(2, dtype=torch.long))).tolist() == shifted
    assert next_tokens({"input_ids": tokens}).tolist() == shifted
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    masked = [[2, 3, -100, -100], [-100, 2, 1, -100]]
    assert next_tokens({"input_ids": tokens, "attention_mask": mask}).tolist() == masked
    labels = torch.tensor([[-100, -100, 3, 4], [4, 3, 2, 1]])
    assert next_tokens({"input_ids": tokens, "labels": labels}).tolist() == [[-100, 3, 4, -100], [3, 2, 1, -100]]
    assert tokens.tolist() == [[1, 2, 3, 4], [4, 3, 2, 1]]


def test_a_dictionary_with_padding_leaves_the_padding_out_of_the_cross_entropy() -> None:
    model, batch = model_of_tokens(), rows(2, 6)
    other = model_of_tokens(run_batch=lambda target, batch: target(batch["input_ids"]))
    mask = torch.ones_like(batch)
    mask[:, 4:] = 0
    metric = CEandKL(threshold=0.4)
    step = torch.tensor(STEP, dtype=torch.int32)
    with torch.no_grad():
        metric.update(
            observe(other, {"input_ids": batch, "attention_mask": mask}, seed=SEED, step=step, training=False)
        )
    assert_same(metric.compute()["ce_target"], ce_kl(model, (batch[:, :4], 0))["ce_target"])
    assert int(metric.labels) == 2 * 3 and int(metric.positions) == 2 * 6


def test_draws_are_keyed_and_leave_the_global_generator_alone() -> None:
    model, batch = model_of_tokens(), rows(3, 4)
    before = torch.get_rng_state()
    first, again, other = (ce_kl(model, (batch, 0), term=term) for term in ("a", "a", "b"))
    assert torch.equal(torch.get_rng_state(), before)
    for name in first:
        assert torch.equal(first[name], again[name])
        drawn = "stochastic" in name or "random" in name
        assert (not torch.equal(first[name], other[name])) == drawn, name
    assert not first["kl_random"].isclose(first["kl_stochastic"])


def test_no_graph_is_kept() -> None:
    metric = CEandKL(threshold=0.4)
    metric.update(observed(model_of_tokens(), rows(3, 4)))
    assert not any(value.requires_grad for value in metric.metric_state.values())


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (torch.ones(3, 4, dtype=torch.float64), r"must be integers \[batch, sequence\].*; got torch.float64 \(3, 4\)"),
        (torch.tensor([1, 2]), r"got torch.int64 \(2,\)"),
        (torch.tensor([[1], [2]]), r"at least two tokens.* got torch.int64 \(2, 1\)"),
        (torch.tensor([[1, 7]]), r"for tokens \(1, 2\) up to 7 the target's output is \(1, 2, 5\)"),
    ],
)
def test_what_is_no_language_is_refused(batch: Tensor, said: str) -> None:
    width = 4 if batch.is_floating_point() else 9
    layers = [nn.Linear(width, 3) if batch.is_floating_point() else nn.Embedding(width, 3), nn.Linear(3, VOCAB)]
    target = frozen(Chain(dict(zip(("first", "out"), layers, strict=True))))
    model = ComponentModel(target=target, sites={"out": 2}, ci_fn=SharedMLP(hidden=[2]))
    with pytest.raises(ValueError, match=said):
        CEandKL(threshold=0.0).check(observed(model, batch))


def test_mse_of_logits_is_refused_and_of_what_is_none_is_not() -> None:
    ladder = PGDLadder(rungs=[1], step_size=0.1, comparison=OutputMSE())
    with pytest.raises(ValueError, match=r"output \(3, 4, 5\) looks like their logits: take .*OutputKL"):
        ladder.check(observed(model_of_tokens(), rows(3, 4)))
    chain = frozen(Chain({"embed": nn.Embedding(VOCAB, 3)}))
    ladder.check(observed(ComponentModel(target=chain, sites={"embed": 2}, ci_fn=SharedMLP(hidden=[2])), rows(3, 4)))


def updated(metric: Evaluation, model: ComponentModel, *parts: tuple[Tensor, int]) -> Evaluation:
    metric.prepare(model)
    for batch, first in parts:
        metric.update(observed(model, batch, first=first))
    return metric


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_active_subcomponents_have_a_mean_ci_above_the_threshold(threshold: float) -> None:
    model, batch = model_of_tokens(), rows(5, 4)
    found = updated(ActiveSubcomponents(threshold=threshold), model, (batch[:2], 0), (batch[2:], 2)).compute()
    lower = {s: x.detach() for s, x in observed(model, batch).ci.lower.items()}
    expected = {s: sum(float(x[..., c].mean()) > threshold for c in range(x.shape[-1])) for s, x in lower.items()}
    assert {name: int(value) for name, value in found.items()} == {**expected, "total": sum(expected.values())}
    assert threshold == 0 or 0 < sum(expected.values()) < 7


def test_l0_by_position_counts_each_position_of_sequences_of_any_length() -> None:
    model, short, long = model_of_tokens(), rows(3, 2), rows(2, 5, seed=1)
    metric = updated(L0ByPositionFigure(threshold=0.3), model, (short, 0), (long, 3), (short, 5))
    figure = metric.compute()[""]
    firing = [(observed(model, batch).ci.lower["out"] > 0.3).sum(-1).double() for batch in (short, long, short)]
    expected = [torch.cat([f[:, t] for f in firing if f.shape[1] > t]).mean() for t in range(5)]
    panel = next(ax for ax in figure.axes if ax.get_title(loc="left") == "out")  # type: ignore[union-attr]
    assert torch.stack(expected).tolist() == pytest.approx(list(panel.lines[0].get_ydata()), rel=1e-6)
    metric.reset()
    assert metric.metric_state["sequences"].numel() == 0
    with pytest.raises(ValueError, match=r"needs sequences.* those of this batch are \(3,\)"):
        metric.check(observed(model, rows(3)))
