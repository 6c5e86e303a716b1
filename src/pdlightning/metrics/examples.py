"""Text one can read: the examples on which the most important subcomponents have their highest ci."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pdlightning.metrics.evaluation import Data, Evaluation, Page
from pdlightning.modules.batches import token_ids
from pdlightning.modules.ci import site_key
from pdlightning.modules.component_model import ComponentModel
from pdlightning.observation import Observation
from pdlightning.ranks import n_ranks, rank

if TYPE_CHECKING:  # pages and figures share a package, and numbers need no matplotlib
    from pdlightning.figures.examples import Example, Site

KEPT = ("logit", "row", "position", "ids", "ci")
NO_TOKEN = -1


class TopExamples(Evaluation):
    """A page with the tokens around the positions of highest ci, for the most important subcomponents of every site.

    Of every row of tokens a subcomponent can keep one position only, so its examples come from different rows.
    Positions are ordered by ci logit, which goes on where ci has reached 1. A site keeps `n_examples * C` windows of
    `2 * context + 1` token ids and ci, however many rows are shown to it.

    Args:
        n_subcomponents: shown of each site, taken by turns from two orders: by mean ci, and by the mean ci at the peaks
            of their examples (of equals the one that fires less often).
        n_examples: of each subcomponent.
        context: tokens to each side of a peak.
        threshold: a subcomponent fires where lower > threshold; one that never does is not shown.
    """

    draws = True
    rows: Tensor
    positions: Tensor

    def __init__(
        self, *, n_subcomponents: int, n_examples: int, context: int, threshold: float, **metric_arguments: Any
    ):
        super().__init__(**metric_arguments)
        if n_subcomponents < 1 or n_examples < 1 or context < 0:
            raise ValueError(
                "TopExamples: n_subcomponents and n_examples must be at least 1 and context at least 0, got "
                f"{n_subcomponents}, {n_examples} and {context}."
            )
        self.n_subcomponents, self.n_examples = n_subcomponents, n_examples
        self.context, self.threshold = context, threshold

    def prepare(self, model: ComponentModel) -> None:
        self.sites = list(model.components)
        n, width = self.n_examples, 2 * self.context + 1
        for name in ("rows", "positions"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        for site in self.sites:
            C = model.components[site].C
            for name, dtype in (("ci_sum", torch.float32), ("fired", torch.long)):
                self.add_state(state(site, name), torch.zeros(C, dtype=dtype), dist_reduce_fx="sum")
            for name, empty in {
                "logit": torch.full((n, C), -torch.inf, dtype=torch.float32),
                "row": torch.zeros(n, C, dtype=torch.int32),
                "position": torch.zeros(n, C, dtype=torch.int32),
                "ids": torch.full((n, C, width), NO_TOKEN, dtype=torch.int32),
                "ci": torch.zeros(n, C, width, dtype=torch.float32),
            }.items():
                self.add_state(state(site, name), empty, dist_reduce_fx=_ranks_after_each_other)

    def check(self, observation: Observation) -> None:
        ids = token_ids(observation.batch)
        if ids is None or ids.ndim != 2:
            found = type(observation.batch).__name__ if ids is None else f"integers {tuple(ids.shape)}"
            raise ValueError(
                "TopExamples shows text, so a batch must be token ids [rows, length], or a tuple that begins with them,"
                f" or a dict with input_ids; got {found}. Leave it out for other targets."
            )
        for site, lower in observation.ci.lower.items():
            if lower.shape[:-1] != ids.shape:
                raise ValueError(
                    f"TopExamples needs one ci for each token, but for tokens {tuple(ids.shape)} site {site!r} ran on "
                    f"positions {tuple(lower.shape[:-1])}."
                )

    def update(self, observation: Observation) -> None:
        self.check(observation)
        ids = token_ids(observation.batch)
        assert ids is not None
        for site in self.sites:
            lower, logits = observation.ci.lower[site].float(), observation.ci.logits[site].float()
            self.of(site, "ci_sum").add_(lower.sum((0, 1)))
            self.of(site, "fired").add_((lower > self.threshold).sum((0, 1)))
            new = best_windows(ids, lower, logits, n=self.n_examples, context=self.context)
            new["row"] += self.rows.int() * n_ranks() + rank() * len(ids)
            both = {name: torch.cat([self.of(site, name), new[name]]) for name in KEPT}
            for name, value in best_of(both, n=self.n_examples).items():
                setattr(self, state(site, name), value)
        self.rows += ids.shape[0]
        self.positions += ids.numel()

    def compute(self) -> dict[str, Page | Data]:
        from pdlightning.figures.examples import examples_data, examples_page

        sites = [self.shown(site) for site in self.sites]
        facts: dict[str, Any] = {"rows": int(self.rows), "positions": int(self.positions), "threshold": self.threshold}
        page = examples_page(sites, decode=self.decode, **facts)
        data = Data(kind="examples", **facts, **examples_data(sites, decode=self.decode))
        return {"": Page(page), "data": data}

    def of(self, site: str, name: str) -> Tensor:
        return getattr(self, state(site, name))

    def shown(self, site: str) -> Site:
        """The chosen subcomponents of a site and their examples, as plain numbers."""
        from pdlightning.figures.examples import Site, Subcomponent

        kept = {name: self.of(site, name).cpu() for name in KEPT}
        best = best_of(kept, n=self.n_examples)  # from several ranks there are more
        ci_sum, fired = self.of(site, "ci_sum").tolist(), self.of(site, "fired").tolist()
        peaks = best["ci"][..., self.context].mean(0).tolist()
        firing = [c for c, n in enumerate(fired) if n]
        chosen = most_important(firing, ci_sum=ci_sum, peaks=peaks, fired=fired)[: self.n_subcomponents]
        subcomponents = [
            Subcomponent(
                index=c,
                mean_ci=ci_sum[c] / int(self.positions),
                peak=peaks[c],
                density=fired[c] / int(self.positions),
                ranks=ranks,
                examples=self.examples(best, c),
            )
            for c, ranks in chosen
        ]
        return Site(path=site, C=len(fired), n_firing=len(firing), subcomponents=subcomponents)

    def examples(self, best: dict[str, Tensor], c: int) -> list[Example]:
        from pdlightning.figures.examples import Example

        columns = [best[name][:, c].tolist() for name in ("row", "position", "ids", "ci")]
        return [
            Example.around(row=row, position=position, ids=ids, ci=ci, no_token=NO_TOKEN)
            for row, position, ids, ci in zip(*columns, strict=True)
            if ci[self.context] > self.threshold
        ]


def state(site: str, name: str) -> str:
    return f"{site_key(site)}:{name}"


def _ranks_after_each_other(gathered: Tensor) -> Tensor:
    """[ranks, n, ...] -> [ranks * n, ...]; the best n of these are taken when the page is made."""
    return gathered.flatten(0, 1)


def best_windows(
    ids: Int[Tensor, "rows length"],
    lower: Float[Tensor, "rows length C"],
    logits: Float[Tensor, "rows length C"],
    *,
    n: int,
    context: int,
) -> dict[str, Tensor]:
    """The n rows (or all, where there are fewer) with the highest logit of each subcomponent, best first.

    `logit`, `row` and `position` of these peaks, `[n, C]`; `ids` and `ci` (lower) around them, `[n, C, window]`.
    """
    peak, at = logits.max(1)
    logit, row = peak.topk(min(n, len(ids)), dim=0)
    position = at.gather(0, row)
    window = position.unsqueeze(-1) + torch.arange(-context, context + 1, device=ids.device)
    outside = (window < 0) | (window >= ids.shape[1])
    window = window.clamp(0, ids.shape[1] - 1)
    here, c = row.unsqueeze(-1), torch.arange(lower.shape[-1], device=ids.device).unsqueeze(-1)
    return {
        "logit": logit,
        "row": row.int(),
        "position": position.int(),
        "ids": ids[here, window].int().masked_fill(outside, NO_TOKEN),
        "ci": lower[here, window, c].masked_fill(outside, 0.0),
    }


def best_of(windows: dict[str, Tensor], *, n: int) -> dict[str, Tensor]:
    """The n windows with the highest logits for each subcomponent, best first."""
    best = windows["logit"].topk(n, dim=0).indices
    with_tokens = best.unsqueeze(-1).expand(-1, -1, windows["ids"].shape[-1])
    return {name: value.gather(0, best if value.ndim == 2 else with_tokens) for name, value in windows.items()}


def most_important(
    firing: list[int], *, ci_sum: list[float], peaks: list[float], fired: list[int]
) -> list[tuple[int, tuple[int, int]]]:
    """The subcomponents in `firing`, by turns from two orders, each with its ranks in them.

    The orders are by `ci_sum`, and by `peaks` to three digits, of equals the one that `fired` less often.
    """
    orders = (
        sorted(firing, key=lambda c: -ci_sum[c]),
        sorted(firing, key=lambda c: (-round(peaks[c], 3), fired[c])),
    )
    by_turns = dict.fromkeys(c for pair in zip(*orders, strict=True) for c in pair)
    ranks = [{c: i for i, c in enumerate(order, start=1)} for order in orders]
    return [(c, (ranks[0][c], ranks[1][c])) for c in by_turns]
