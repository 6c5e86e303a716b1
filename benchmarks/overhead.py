"""Milliseconds per step that the Trainer, its callbacks and loggers add to a bare loop over the same step.

A third loop is the least that Lightning can do: the same step in a `Trainer(barebones=True)` without a callback.

    python benchmarks/overhead.py [--experiment tms_5-2] [--steps 300] [--rounds 5]

All sides train the same decomposition on the same batches, with evaluation off, in turns within one process; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import lightning
import torch
from hydra import compose, initialize_config_dir

from pdlightning import build
from pdlightning.callbacks import Throughput
from pdlightning.config import to_plain
from pdlightning.run import build_checkpoints, build_trainer
from pdlightning.runtime import prepare_runtime


def fresh(config):
    target = build.make_target(config, build.build_target(config)).model
    return build.build_decomposition(config, target), build.build_data(config)


def bare_loop(config) -> None:
    decomposition, data = fresh(config)
    optimizer = decomposition.configure_optimizers()
    batches = iter(data.train_dataloader())
    for step in range(config["steps"]):
        if step == 20:
            begin = time.perf_counter(), time.process_time()
        decomposition.set_progress(step)
        decomposition.set_learning_rates(optimizer, step)
        optimizer.zero_grad()
        total, pairs, _ = decomposition.compute_step(next(batches), decomposition.step_now)
        for name, loss in decomposition.terms.items():
            loss.update(pairs[name])
        total.backward()
        optimizer.step()
    return per_step(begin, config["steps"] - 20)


class BareModule(lightning.LightningModule):
    """The step of `bare_loop`, and nothing else that a LightningModule can do."""

    def __init__(self, decomposition, steps: int):
        super().__init__()
        self.decomposition, self.steps = decomposition, steps

    def configure_optimizers(self):
        return self.decomposition.configure_optimizers()

    def training_step(self, batch, batch_idx):
        step, decomposition = self.global_step, self.decomposition
        if step == 20:
            self.begin = time.perf_counter(), time.process_time()
        if step == self.steps - 1:
            self.result = per_step(self.begin, self.steps - 21)
        decomposition.set_progress(step)
        decomposition.set_learning_rates(self.optimizers(use_pl_optimizer=False), step)
        total, pairs, _ = decomposition.compute_step(batch, decomposition.step_now)
        for name, loss in decomposition.terms.items():
            loss.update(pairs[name])
        return total


def barebones_loop(config):
    decomposition, data = fresh(config)
    module = BareModule(decomposition, config["steps"])
    trainer = lightning.Trainer(max_steps=config["steps"], accelerator="cpu", barebones=True, inference_mode=False)
    trainer.fit(module, datamodule=data)
    return module.result


def trainer_loop(config):
    from lightning import Callback

    class Clock(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 20:
                self.begin = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == config["steps"] - 1:
                self.result = per_step(self.begin, config["steps"] - 21)

    decomposition, data = fresh(config)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        evaluation = build.build_evaluation(config)
        evaluation.report = lambda *_, **__: None
        callbacks = [Throughput(), evaluation, build_checkpoints(config, Path(folder))]
        trainer = build_trainer(config, Path(folder), callbacks, first_step=0)
        trainer.callbacks.insert(0, clock)
        trainer.fit(decomposition, datamodule=data)
    return clock.result


def per_step(begin: tuple[float, float], steps: int) -> tuple[float, float]:
    return 1e3 * (time.perf_counter() - begin[0]) / steps, 1e3 * (time.process_time() - begin[1]) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="tms_5-2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    conf = Path(__file__).resolve().parents[1] / "conf"
    with initialize_config_dir(str(conf), version_base="1.3"):
        overrides = [
            f"experiment={arguments.experiment}",
            f"steps={arguments.steps}",
            f"runtime.threads={arguments.threads}",
            "logging.progress=false",
            "logging.checkpoint_every=1000000",
            "pd.faithfulness_warmup=null",
        ]
        config = to_plain(compose("config", overrides))
    prepare_runtime(config["runtime"])
    rounds = [(bare_loop(config), barebones_loop(config), trainer_loop(config)) for _ in range(arguments.rounds)]
    print(f"{date.today()}  {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    for i, clock in enumerate(("wall", "CPU")):
        bare, least, trained = (statistics.median(r[side][i] for r in rounds) for side in range(3))
        extra, floor = (statistics.median(r[side][i] - r[0][i] for r in rounds) for side in (2, 1))
        print(
            f"{clock:>4} ms per step: bare loop {bare:.2f}, barebones Trainer {least:.2f}, our Trainer {trained:.2f};"
            f" overhead {extra:.2f}, of which Lightning's least {floor:.2f}"
        )


if __name__ == "__main__":
    main()
