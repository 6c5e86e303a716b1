"""The sites of a decomposition in numbers: what the table and the ci spectrum of a report are made of."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pdlightning.metrics.evaluation import Data, PositionSums, significant
from pdlightning.modules.component_model import ComponentModel
from pdlightning.modules.site import Components
from pdlightning.observation import Observation


class SiteTable(PositionSums):
    """Of every site: kind, sizes, C, mean L0, faithfulness; of every subcomponent: mean ci and firing density.

    Written as data beside the figures; the report of a run shows it.

    Args:
        threshold: a subcomponent fires where lower > threshold.
    """

    draws = True
    model: ComponentModel

    def __init__(self, *, threshold: float, **metric_arguments: Any):
        super().__init__(**metric_arguments)
        self.threshold = threshold

    def state_like(self, model: ComponentModel, site: str) -> Tensor:
        return torch.zeros(2, model.components[site].C)

    def site_sum(self, observation: Observation, site: str) -> Float[Tensor, "2 C"]:
        lower = observation.ci.lower[site].flatten(0, -2)
        return torch.stack([lower.sum(0), (lower > self.threshold).sum(0).to(lower)])

    def update(self, observation: Observation) -> None:
        super().update(observation)
        object.__setattr__(self, "model", observation.model)  # not as a submodule: it is looked at, not owned

    def compute(self) -> dict[str, Data]:
        sites = {}
        for path, (mean_ci, density) in self.means().items():
            c = self.model.components[path]
            sites[path] = {
                **{"kind": c.kind, "d_in": c.d_in, "d_out": c.d_out, "C": c.C},
                "l0": significant(density.sum()),
                **site_faithfulness(c),
                "mean_ci": significant(mean_ci),
                "density": significant(density),
            }
        return {"": Data(kind="sites", threshold=self.threshold, positions=int(self.positions), sites=sites)}


def site_faithfulness(components: Components) -> dict[str, float]:
    """||D||^2 / numel(W) and ||D||^2 / ||W||^2 of one site, in fp32 even under autocast (spec L2)."""
    with torch.no_grad(), torch.autocast(components.V.device.type, enabled=False):
        squared = components.weight_delta.float().square().sum()
        weight = components.target_weight.float()
        mean, relative = squared / weight.numel(), squared / weight.square().sum()
    return {"faithfulness": significant(mean), "relative_faithfulness": significant(relative)}
