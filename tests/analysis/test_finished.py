"""What is measured again on a finished run: mean ci, the alpha sweep, and the comparison of two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdlightning import ParameterDecomposition
from pdlightning.analysis import evaluation
from pdlightning.analysis.alpha import alpha_sweep
from pdlightning.analysis.comparison import NotComparable, common_sites, compare_runs, numbers, total
from pdlightning.analysis.evaluation import mean_ci
from pdlightning.loading import LoadedRun
from pdlightning.metrics import FaithfulnessLoss
from pdlightning.modules import SharedMLP

VOCAB = 7
Make = Callable[..., LoadedRun]


@pytest.fixture
def finished_run(monkeypatch: pytest.MonkeyPatch) -> Make:
    """A run around a model of tokens, or of vectors, whose evaluation data are batches of unequal size."""

    def make(*batches: Tensor, seed: int = 0, target_seed: int = 0, **sites: int) -> LoadedRun:
        torch.manual_seed(target_seed)
        first = nn.Embedding(VOCAB, 4) if batches[0].dtype == torch.long else nn.Linear(3, 4)
        target = nn.Sequential(first, nn.Linear(4, VOCAB)).requires_grad_(False)
        decomposition = ParameterDecomposition(
            target=target,
            sites=sites or {"0": 5, "1": 6},
            ci_fn=SharedMLP(hidden=[3]),
            losses={"faithfulness": FaithfulnessLoss(coeff=1.0)},
            seed=seed,
        )
        with torch.no_grad():
            for parameter in decomposition.model.ci_fn.parameters():
                parameter.add_(torch.randn_like(parameter))
        data = SimpleNamespace(val_dataloader=lambda: list(batches))
        monkeypatch.setattr(evaluation, "build_data", lambda config: data)
        config: dict[str, Any] = {"runtime": {"precision": "32-true"}}
        return LoadedRun(Path(), config, decomposition.eval(), 10, {})

    return make


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_mean_ci_is_over_all_positions_of_all_batches(finished_run: Make) -> None:
    batches = vectors(2, 6, 3), vectors(3, 1, 3, seed=1)
    run = finished_run(*batches)
    of_each = [run.decomposition.causal_importances(batch).lower for batch in batches]
    for site, found in mean_ci(run).items():
        every = torch.cat([lower[site].double().flatten(0, -2) for lower in of_each])
        assert len(every) == 15
        torch.testing.assert_close(found, every.mean(0))


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_an_alpha_sweep_of_tokens_is_the_cross_entropy_and_kl_of_its_masks(finished_run: Make, r: float) -> None:
    batches = tokens(2, 5), tokens(4, 3, seed=1)
    run = finished_run(*batches)
    found = alpha_sweep(run, [0.7, r])
    pd, ce, own, kl = run.decomposition, [], [], []
    for batch in batches:
        lower = pd.causal_importances(batch).lower
        with torch.no_grad():
            clean = pd.target(batch)
            output = pd.masked_forward(batch, {site: ci + (1 - ci) * r for site, ci in lower.items()})
        labels = batch[:, 1:].flatten()
        for logits, losses in ((output, ce), (clean, own)):
            losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="none"))
        p = clean.log_softmax(-1)
        kl.append((p.exp() * (p - output.log_softmax(-1))).sum(-1).flatten())
    assert [len(torch.cat(losses)) for losses in (ce, kl)] == [16, 22]
    assert found.values["ce"][1] == pytest.approx(float(torch.cat(ce).mean()), rel=1e-5)
    assert found.values["kl"][1] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert found.target == {"ce": pytest.approx(float(torch.cat(own).mean()), rel=1e-5)}
    assert found.values["ce"][0] != found.values["ce"][1] and not torch.is_inference_mode_enabled()


def test_an_alpha_sweep_of_vectors_is_the_squared_error_over_all_elements(finished_run: Make) -> None:
    batches = vectors(4, 3), vectors(1, 3, seed=1)
    run = finished_run(*batches)
    found = alpha_sweep(run, [0.25])
    errors = []
    for batch in batches:
        lower = run.decomposition.causal_importances(batch).lower
        with torch.no_grad():
            output = run.decomposition.masked_forward(batch, {s: ci + (1 - ci) * 0.25 for s, ci in lower.items()})
            errors.append((output - run.decomposition.target(batch)).square().flatten())
    assert found.values == {"mse": [pytest.approx(float(torch.cat(errors).mean()), rel=1e-5)]} and not found.target


def test_a_run_is_itself_exactly(finished_run: Make) -> None:
    run = finished_run(vectors(8, 3))
    rows = dict(compare_runs(run, run, firing=0.01))
    for line in (*map(numbers, rows.values()), total(list(rows.values()))):
        assert line["mmcs_a_to_b"] == line["mmcs_b_to_a"] == line["mean_matched_cosine"] == 1.0
        assert line["target_difference"] == 0.0 and line["compared_a"] == line["pairs"] > 0


def test_only_what_fires_more_than_the_threshold_is_compared(finished_run: Make) -> None:
    run = finished_run(vectors(8, 3))
    ci = mean_ci(run)
    threshold = float(ci["1"].sort().values[2])
    rows = dict(compare_runs(run, run, sites="1", firing=threshold))
    assert rows.keys() == {"1"} and set(rows["1"].similarity.compared[0].tolist()) == set(
        ci["1"].argsort()[3:].tolist()
    )
    everything = dict(compare_runs(run, run, firing=None))
    assert [len(row.similarity.pairs) for row in everything.values()] == [5, 6]


def test_other_weights_are_told_and_the_total_counts_every_subcomponent_once(finished_run: Make) -> None:
    a, b = finished_run(vectors(8, 3)), finished_run(vectors(8, 3), seed=1, target_seed=1)
    rows = dict(compare_runs(a, b, firing=None))
    for site, row in rows.items():
        weights = [run.decomposition.components[site].target_weight for run in (a, b)]
        expected = float((weights[0] - weights[1]).norm() / weights[0].norm())
        assert row.target_difference == pytest.approx(expected, rel=1e-5) and expected > 0.1
    lines, every = [numbers(row) for row in rows.values()], total(list(rows.values()))
    assert (every["C_a"], every["pairs"]) == (11, 11)
    for name in ("mmcs_a_to_b", "mmcs_b_to_a", "mean_matched_cosine"):
        assert every[name] == pytest.approx((5 * lines[0][name] + 6 * lines[1][name]) / 11)


def sites(**sizes: tuple[int, int]) -> Any:
    return {site: SimpleNamespace(d_out=d_out, d_in=d_in) for site, (d_out, d_in) in sizes.items()}


def test_without_a_common_site_both_sides_are_named() -> None:
    with pytest.raises(NotComparable, match="no site in common. Sites of A: x. Sites of B: y, z."):
        common_sites(sites(x=(1, 2)), sites(y=(1, 2), z=(1, 2)))
    with pytest.raises(NotComparable, match="no site that fits 'q.*' in common. Sites of A: x"):
        common_sites(sites(x=(1, 2)), sites(x=(1, 2)), "q.*")
    many = sites(**{f"s{i}": (1, 2) for i in range(12)})
    with pytest.raises(NotComparable, match="Sites of A: s0, s1, .*s7 and 4 more. Sites of B: x."):
        common_sites(many, sites(x=(1, 2)))


def test_another_shape_under_one_name_is_refused_unless_it_is_left_out() -> None:
    a, b = sites(x=(1, 2), y=(3, 4)), sites(x=(1, 2), y=(4, 3))
    with pytest.raises(NotComparable, match="different shapes: y is 3 x 4 in A and 4 x 3 in B. .*Sites of A: x, y"):
        common_sites(a, b)
    assert common_sites(a, b, "x") == ["x"]
