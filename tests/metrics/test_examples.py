"""Top activating examples: against a plain search, and on a language model whose truth is planted."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from parity import batch_of, built, observed, seeded
from torch import Tensor, nn

from pdlightning.figures.examples import Site
from pdlightning.metrics import TopExamples
from pdlightning.metrics.examples import KEPT, NO_TOKEN, most_important, state
from pdlightning.modules import ComponentModel, ScalarMLP

WORDS = ["\n", " the", " cat", " sat", "<script>alert(1)</script>", "   ", " on", "\t", " mat", "é", "\u200b", "&amp;"]


def gathered(model: ComponentModel, *batches: Any, n_examples: int = 3, context: int = 2, **more: Any) -> TopExamples:
    metric = TopExamples(
        **{"n_subcomponents": 20, "n_examples": n_examples, "context": context, "threshold": 0.1, **more}
    )
    metric.prepare(model)
    for batch in batches:
        metric.update(observed(model, batch))
    return metric


def searched(lower: Tensor, logits: Tensor, ids: Tensor, c: int, n: int, context: int) -> list[dict[str, Any]]:
    """The same by a plain search over all rows at once."""
    peaks = sorted(((logits[b, :, c].max().item(), b) for b in range(len(ids))), reverse=True)[:n]
    found = []
    for _, b in peaks:
        t = int(logits[b, :, c].argmax())
        window = range(max(t - context, 0), min(t + context + 1, ids.shape[1]))
        ci = [lower[b, i, c].item() for i in window]
        found.append({"row": b, "position": t, "ids": ids[b, window].tolist(), "ci": ci, "peak": t - window[0]})
    return [example for example in found if example["ci"][example["peak"]] > 0.1]


@pytest.mark.parametrize("parts", [[9], [4, 5], [1, 2, 6]])
@pytest.mark.parametrize("context", [0, 2, 9])
def test_streaming_finds_what_a_search_over_everything_finds(parts: list[int], context: int) -> None:
    model, ids = built("tokens"), batch_of("tokens", (9, 6))
    metric = gathered(model, *ids.split(parts), context=context)
    ci = observed(model, ids).ci
    compared = 0
    for site in model.components:
        shown = metric.shown(site)
        firing = [c for c in range(shown.C) if (ci.lower[site][..., c] > 0.1).any()]
        assert sorted(c.index for c in shown.subcomponents) == firing and shown.n_firing == len(firing)
        for c in shown.subcomponents:
            lower = ci.lower[site][..., c.index]
            assert c.mean_ci == pytest.approx(lower.mean().item()), site
            assert c.density == pytest.approx((lower > 0.1).float().mean().item())
            expected = searched(ci.lower[site], ci.logits[site], ids, c.index, 3, context)
            # Equal tokens have equal logits at the embedding, and rows that tie may come in any order.
            logits = [ci.logits[site][e.row, e.position, c.index].item() for e in c.examples]
            best = [ci.logits[site][e["row"], e["position"], c.index].item() for e in expected]
            assert logits == pytest.approx(best)
            assert len({e.row for e in c.examples}) == len(c.examples) > 0
            for example in c.examples:
                alone = searched(ci.lower[site], ci.logits[site], ids, c.index, 9, context)
                (same,) = [e for e in alone if e["row"] == example.row]
                assert (example.position, list(example.ids), example.peak) == (
                    same["position"],
                    same["ids"],
                    same["peak"],
                )
                assert example.ci == pytest.approx(same["ci"])
                compared += 1
    assert compared > 10


def planted(n_unused: int = 2) -> ComponentModel:
    """Token t is the unit vector t, and subcomponent c of both sites reads it: c fires on word c, and no other does."""
    n = len(WORDS)
    model = nn.Sequential(nn.Embedding(n, n), nn.Linear(n, n, bias=False)).requires_grad_(False)
    model[0].weight.copy_(torch.eye(n))  # type: ignore[operator, union-attr]
    components = ComponentModel(target=model, sites={"0": n, "1": n + n_unused}, ci_fn=ScalarMLP(hidden=[1]))
    with torch.no_grad():
        for c in components.components.values():
            c.V.copy_(torch.eye(n, c.C) * torch.linspace(1.5, 0.5, c.C))
        for name, parameter in components.ci_fn.named_parameters():
            parameter.fill_(1.0 if ".weights." in name else 0.0)  # ci = gelu(x V)
    return components


def word_batches(n: int) -> list[Tensor]:
    generator = seeded(0)
    return [(torch.rand(16, 40, generator=generator) ** 2 * len(WORDS)).long() for _ in range(n)]


def test_the_subcomponents_of_a_planted_model_show_their_words() -> None:
    metric = gathered(planted(), *word_batches(3), n_examples=5, context=4)
    for site in ("0", "1"):
        shown: Site = metric.shown(site)
        assert sorted(c.index for c in shown.subcomponents) == list(range(len(WORDS))), "the unused are left out"
        for c in shown.subcomponents:
            assert len({e.row for e in c.examples}) == len(c.examples) == 5
            for e in c.examples:
                assert e.ids[e.peak] == c.index
                assert all((ci > 0) == (token == c.index) for token, ci in zip(e.ids, e.ci, strict=True))


class Marks(HTMLParser):
    """What stands in the marks of the page, and all elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.marks: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "mark":
            self.marks.append("")

    def handle_data(self, data: str) -> None:
        if self.marks and self.tags[-1][0] == "mark":
            self.marks[-1] += data
            self.tags.append(("text", {}))


def test_the_page_of_a_planted_model_marks_its_words_and_runs_no_token_as_code() -> None:
    metric = gathered(planted(), *word_batches(3), n_subcomponents=len(WORDS))
    metric.decode = lambda ids: [WORDS[i] for i in ids]
    parsed = Marks(metric.compute()[""])
    assert {"↵", " the", "<script>alert(1)</script>", "···", "⇥", "é", "\\u200b", "&amp;"} <= set(parsed.marks)
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == 1 and tags.count("details") == 2 * len(WORDS)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in parsed.tags)


def test_memory_does_not_grow_with_the_rows() -> None:
    model, batches = planted(), word_batches(6)
    sizes = [
        sum(value.numel() for value in gathered(model, *batches[:n]).metric_state.values())  # type: ignore[union-attr]
        for n in (1, 6)
    ]
    assert sizes[0] == sizes[1]


def test_what_several_ranks_gathered_is_what_one_would_have() -> None:
    model, batches = built("tokens"), batch_of("tokens", (9, 6)).split([4, 5])
    one, (first, second) = gathered(model, *batches), [gathered(model, batch) for batch in batches]
    for name, reduce in one._reductions.items():
        stacked = torch.stack([getattr(first, name), getattr(second, name)])
        setattr(first, name, reduce(stacked))  # type: ignore[misc]
    assert len(first.of("out", "logit")) == 6
    for site in model.components:
        for c, same in zip(first.shown(site).subcomponents, one.shown(site).subcomponents, strict=True):
            assert (c.index, c.ranks, c.density) == (same.index, same.ranks, same.density)
            assert (c.mean_ci, c.peak) == pytest.approx((same.mean_ci, same.peak))
            assert sorted(max(e.ci) for e in c.examples) == pytest.approx(sorted(max(e.ci) for e in same.examples))


def test_subcomponents_are_chosen_by_turns_from_the_two_orders() -> None:
    ci_sum, peaks, fired = [5.0, 4.0, 0.0, 1.0, 0.5], [0.6, 1.0, 0.0, 1.0, 0.9996], [9, 8, 0, 3, 2]
    chosen = most_important([0, 1, 3, 4], ci_sum=ci_sum, peaks=peaks, fired=fired)
    # By mean ci: 0, 1, 3, 4. By peak: 4, 3, 1, 0, since three of them peak at 1.000 and the rarest comes first.
    assert chosen == [(0, (1, 4)), (4, (4, 1)), (1, (2, 3)), (3, (3, 2))]


def test_windows_end_where_their_row_ends() -> None:
    metric = gathered(planted(), torch.tensor([[3, 0, 0, 0], [0, 0, 0, 3]]), context=2)
    assert sorted(metric.of("1", "ids")[:2, 3].tolist()) == [
        [NO_TOKEN, NO_TOKEN, 3, 0, 0],
        [0, 0, 3, NO_TOKEN, NO_TOKEN],
    ]
    assert metric.of("1", "logit")[2, 3] == -torch.inf, "two rows make no third example"
    assert {name for name in KEPT if state("1", name) in metric.metric_state} == set(KEPT)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (torch.rand(2, 3), r"must be token ids \[rows, length\].*got Tensor"),
        (torch.tensor([1, 2]), r"got integers \(2,\)"),
        ({"ids": torch.ones(2, 3)}, "got dict"),
    ],
)
def test_batches_without_tokens_are_refused(batch: Any, said: str) -> None:
    metric, observation = gathered(planted()), observed(planted(), torch.tensor([[1, 2]]))
    observation.batch = batch
    with pytest.raises(ValueError, match=said):
        metric.update(observation)


def test_ci_of_other_positions_than_the_tokens_are_refused() -> None:
    metric, observation = gathered(planted()), observed(planted(), torch.tensor([[1, 2]]))
    observation.batch = (torch.tensor([[1, 2, 3]]), None)
    with pytest.raises(ValueError, match=r"for tokens \(1, 3\) site '0' ran on positions \(1, 2\)"):
        metric.update(observation)


@pytest.mark.parametrize("wrong", [{"n_subcomponents": 0}, {"n_examples": 0}, {"context": -1}])
def test_impossible_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1 and context at least 0"):
        gathered(planted(), **wrong)
