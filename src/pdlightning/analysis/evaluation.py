"""The evaluation batches of a finished run, seen once more; and the mean ci of its subcomponents on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from pdlightning.build import build_data, mistakes_of_the_user
from pdlightning.observation import Observation, observe
from pdlightning.runtime import mixed_precision

if TYPE_CHECKING:
    from pdlightning.loading import LoadedRun


@contextmanager
def as_evaluated(run: LoadedRun) -> Iterator[Iterator[Observation]]:
    """Gives the observations of the run's evaluation batches; within, no gradient and the precision of the run."""
    with mistakes_of_the_user():
        data = build_data(run.config)
    with torch.no_grad(), mixed_precision(run.config["runtime"]["precision"], run.decomposition.device):
        yield (observed(run, batch, index) for index, batch in enumerate(data.val_dataloader()))


def observed(run: LoadedRun, batch: object, index: int) -> Observation:
    """With the keys that an evaluation gives its batches."""
    pd = run.decomposition
    return observe(
        pd.model,
        pd.transfer_batch_to_device(batch, pd.device, 0),
        seed=pd.seed,
        step=torch.tensor(-1 - index, dtype=torch.int32, device=pd.device),
        training=False,
    )


def mean_ci(run: LoadedRun) -> dict[str, Float[Tensor, " C"]]:
    """site -> the mean lower ci of its subcomponents over all positions of the evaluation data, in float64."""
    sums: dict[str, Tensor] = {}
    positions = 0
    with as_evaluated(run) as observations:
        for observation in observations:
            positions += observation.leading_size
            for site, lower in observation.ci.lower.items():
                total = lower.flatten(0, -2).sum(0, dtype=torch.float64).cpu()
                sums[site] = sums[site] + total if site in sums else total
    return {site: total / positions for site, total in sums.items()}
