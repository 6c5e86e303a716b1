"""The data of the sites that a report is made of: against plain sums, and in parts of a batch."""

from __future__ import annotations

import pytest
from parity import batch_of, built, observed

from pdlightning.metrics import SiteTable
from pdlightning.metrics.evaluation import Data
from pdlightning.modules import ComponentModel

pytestmark = pytest.mark.usefixtures("float64")
THRESHOLD = 0.3


def table(model: ComponentModel, *parts: tuple[int, int]) -> Data:
    evaluation = SiteTable(threshold=THRESHOLD)
    evaluation.prepare(model)
    batch = batch_of("tokens", (8, 3))
    for first, beyond in parts:
        evaluation.update(observed(model, batch[first:beyond], first=first))
    return evaluation.compute()[""]


def test_every_site_has_its_sizes_its_mean_ci_and_its_faithfulness() -> None:
    model = built("tokens")
    found = table(model, (0, 8))
    assert (found["kind"], found["threshold"], found["positions"]) == ("sites", THRESHOLD, 24)
    lower = observed(model, batch_of("tokens", (8, 3))).ci.lower
    assert list(found["sites"]) == list(model.components)
    for path, site in found["sites"].items():
        c, ci = model.components[path], lower[path].flatten(0, -2)
        assert (site["kind"], site["C"], site["d_in"], site["d_out"]) == (c.kind, c.C, *c.target_weight.T.shape)
        assert site["mean_ci"] == pytest.approx(ci.mean(0).tolist(), rel=1e-4)
        assert site["density"] == pytest.approx(
            [sum(x > THRESHOLD for x in row) / 24 for row in ci.T.tolist()], rel=1e-4
        )
        assert site["l0"] == pytest.approx(sum(site["density"]), rel=1e-3)
        delta = (c.target_weight - (c.V @ c.U).T).detach()
        assert site["faithfulness"] == pytest.approx(float((delta**2).mean()), rel=1e-4)
        assert site["relative_faithfulness"] == pytest.approx(
            float((delta**2).sum() / (c.target_weight**2).sum()), rel=1e-4
        )


def test_unequal_parts_of_a_batch_give_the_data_of_the_whole() -> None:
    model = built("tokens")
    whole, parts = table(model, (0, 8))["sites"], table(model, (0, 3), (3, 8))["sites"]
    for path, site in whole.items():
        assert parts[path]["mean_ci"] == pytest.approx(site["mean_ci"], rel=1e-3)
        assert parts[path]["l0"] == pytest.approx(site["l0"], rel=1e-3)
