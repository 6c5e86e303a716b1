"""Evaluation on its own batches with its own randomness (spec 8, D1): it changes nothing of the training."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor

from pdlightning.decomposition import ParameterDecomposition
from pdlightning.metrics.evaluation import Data, Evaluation, Page
from pdlightning.metrics.loss import Loss
from pdlightning.observation import observe
from pdlightning.ranks import rank
from pdlightning.schema import check_multiple
from pdlightning.sharding import whole
from pdlightning.storage import StorageError
from pdlightning.tracking import Tracker, pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics = Mapping[str, Evaluation | Loss]


class Evaluate(Callback):
    """Runs metrics at the first step, every so many steps, and always at the last.

    Args:
        metrics: name -> metric, at every evaluation. The losses of the training are measured beside them.
        slow_metrics: name -> metric, at every slow evaluation, the first and the last: figures, long attacks.
        every: steps between evaluations.
        slow_every: steps between slow ones, a multiple of `every`.
        batches: the evaluation batches; by default the val_dataloader of the trainer's datamodule.
        save_figure: called with (name, figure or page, step); without it figures only go to the loggers.
    """

    def __init__(
        self,
        *,
        metrics: Metrics,
        slow_metrics: Metrics,
        every: int,
        slow_every: int,
        batches: Iterable[Any] | None = None,
        save_figure: Callable[[str, Figure | Page | Data, int], None] | None = None,
    ):
        if every < 1 or slow_every < 1:
            raise ValueError(f"every and slow_every must be at least 1, got {every} and {slow_every}.")
        check_multiple(eval_every=every, slow_eval_every=slow_every)
        if both := metrics.keys() & slow_metrics.keys():
            raise ValueError(f"Metrics named twice, as fast and as slow: {', '.join(sorted(both))}.")
        self.metrics, self.slow_metrics = dict(metrics), dict(slow_metrics)
        self.every, self.slow_every = every, slow_every
        self.batches, self.save_figure = batches, save_figure
        self.latest: dict[str, float] = {}
        self.latest_step = -1
        self.precision: Callable[[], AbstractContextManager[Any]] = nullcontext  # the Trainer's, where there is one

    def setup(self, trainer: Trainer, pl_module: ParameterDecomposition, stage: str) -> None:  # type: ignore[override]
        self.prepare(pl_module)
        self.precision = trainer.precision_plugin.forward_context
        for metric in (*self.metrics.values(), *self.slow_metrics.values()):
            if isinstance(metric, Evaluation):
                metric.decode = getattr(trainer.datamodule, "decode", None)  # type: ignore[attr-defined]

    def prepare(self, pl_module: ParameterDecomposition) -> None:
        """Show the model to every metric; a pattern that fits nothing is refused here."""
        for name, metric in {**self.metrics, **self.slow_metrics}.items():
            metric.term = f"eval/{name}"
            metric.prepare(pl_module.model)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: ParameterDecomposition) -> None:  # type: ignore[override]
        if trainer.global_step == 0:  # after the faithfulness warmup, which is in on_train_start
            self.report(trainer, pl_module, slow=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: ParameterDecomposition, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        last = step == trainer.max_steps
        if step != self.latest_step and (last or step % self.every == 0):
            self.report(trainer, pl_module, slow=last or step % self.slow_every == 0)

    def on_train_end(self, trainer: Trainer, pl_module: ParameterDecomposition) -> None:  # type: ignore[override]
        if self.latest_step != trainer.global_step:  # a training that ends by epochs or early knows no last step
            self.report(trainer, pl_module, slow=True)

    def report(self, trainer: Trainer, pl_module: ParameterDecomposition, *, slow: bool) -> None:
        """Evaluate, log the numbers, save and log the figures."""
        step = self.latest_step = trainer.global_step
        batches = self.batches if self.batches is not None else trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        numbers, drawn = self.evaluate(pl_module, batches, step=step, slow=slow)
        values = {name: value.item() for name, value in numbers.items()}
        self.latest.update(values)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        for name, figure in drawn.items():
            with report_broken_figure(name):
                for logger in trainer.loggers:
                    log_figure(logger, name, figure, step)
                if self.save_figure is not None and rank() == 0:
                    self.save_figure(name, figure, step)

    def measure_again(self, pl_module: ParameterDecomposition, batches: Iterable[Any], *, step: int) -> None:
        """All numbers after `step` steps, without a training around them; nothing is logged."""
        numbers, _ = self.evaluate(pl_module, batches, step=step, slow=True)
        self.latest, self.latest_step = {name: value.item() for name, value in numbers.items()}, step

    def evaluate(
        self, pl_module: ParameterDecomposition, batches: Iterable[Any], *, step: int, slow: bool
    ) -> tuple[dict[str, Tensor], dict[str, Figure | Page | Data]]:
        """The numbers and figures of the model as it is after `step` steps. No state of the training is moved."""
        progress = min(step, pl_module.steps - 1)
        pl_module.set_progress(progress)
        terms = pl_module.terms
        losses: dict[str, Evaluation | Loss] = {f"loss/{name}": deepcopy(loss) for name, loss in terms.items()}
        for name, loss in losses.items():
            loss.term = f"eval/{name}"
        metrics = {**losses, **self.metrics, **(self.slow_metrics if slow else {})}
        for metric in metrics.values():
            metric.reset()
            metric.to(pl_module.device)
            if isinstance(metric, Loss):
                metric.set_progress(progress, pl_module.steps)
        outputs = any(metric.needs_outputs for metric in metrics.values())
        with torch.no_grad(), self.precision(), whole(pl_module.model):
            for index, batch in enumerate(batches):
                observation = observe(
                    pl_module.model,
                    pl_module.transfer_batch_to_device(batch, pl_module.device, 0),
                    seed=pl_module.seed,
                    # Training counts steps from 0, evaluation batches count down from -1: no key in common.
                    step=torch.tensor(-1 - index, dtype=torch.int32, device=pl_module.device),
                    training=False,
                    outputs=outputs,
                )
                for name, metric in list(metrics.items()):
                    with skip_broken_figure(name, metric, metrics):
                        metric.update(observation)
            return self.results(metrics)

    def results(
        self, metrics: dict[str, Evaluation | Loss]
    ) -> tuple[dict[str, Tensor], dict[str, Figure | Page | Data]]:
        numbers: dict[str, Tensor] = {}
        drawn: dict[str, Figure | Page | Data] = {}
        for name, metric in list(metrics.items()):
            result: Any = {}
            with skip_broken_figure(name, metric, metrics):
                result = metric.compute()
            for key, value in (result if isinstance(result, dict) else {"": result}).items():
                full = f"eval/{name}/{key}" if key else f"eval/{name}"
                (numbers if isinstance(value, Tensor) else drawn)[full] = value  # type: ignore[assignment]
        numbers["eval/loss/total"] = total_loss(metrics)
        return numbers, drawn


def total_loss(metrics: Metrics) -> Tensor:
    """sum of coeff * loss over the training losses among the metrics (spec L1)."""
    losses = [metric for name, metric in metrics.items() if name.startswith("loss/") and isinstance(metric, Loss)]
    return torch.stack([torch.as_tensor(loss.coeff.now) * loss.compute() for loss in losses]).sum()


@contextmanager
def skip_broken_figure(name: str, metric: Evaluation | Loss, metrics: dict[str, Evaluation | Loss]) -> Iterator[None]:
    """A figure that fails is left out of this evaluation; a number that fails is an error."""
    if not isinstance(metric, Evaluation) or not metric.draws:
        yield
        return
    with report_broken_figure(name):
        try:
            yield
        except Exception:
            del metrics[name]
            raise


@contextmanager
def report_broken_figure(name: str) -> Iterator[None]:
    """A figure is no reason to lose a run; a full disk is."""
    try:
        yield
    except StorageError:
        raise
    except Exception:
        rank_zero_warn(f"The figure {name!r} failed and is skipped; the run goes on.\n{traceback.format_exc()}")


def log_figure(logger: Any, name: str, figure: Figure | Page | Data, step: int) -> None:
    """To our trackers, and to those loggers of Lightning that take images. Others have the file."""
    if isinstance(figure, Data):
        return
    if isinstance(logger, Tracker):
        logger.log_figure(name, figure, step)
    elif isinstance(figure, Page):
        return
    elif hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[pixels(figure)], step=step)
    elif hasattr(getattr(logger, "experiment", None), "add_figure"):
        logger.experiment.add_figure(name, figure, global_step=step)
