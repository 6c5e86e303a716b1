"""The speed that is logged, by a clock that the test winds."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pdlightning import ParameterDecomposition
from pdlightning.callbacks import Evaluate, RunCheckpoint, Throughput, throughput
from pdlightning.checkpoints import AtomicCheckpointIO
from pdlightning.loggers import MetricsCSV
from pdlightning.masking import AdamAscent, AllSites, PersistentPGD
from pdlightning.metrics import Evaluation, FaithfulnessLoss, OutputMSE, ReconstructionLoss
from pdlightning.modules import SharedMLP
from pdlightning.rehearsal.dry import DryDecomposition

STEP, FETCH, EVALUATION, SAVING = 1.0, 0.25, 100.0, 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    wound = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: wound.now))
    return wound


def decomposition(*, embedding: bool = False) -> ParameterDecomposition:
    layers = [nn.Embedding(10, 4)] if embedding else [nn.Linear(4, 4)]
    generator = torch.Generator().manual_seed(0)
    target = nn.Sequential(*layers, nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)
    for parameter in target.parameters():
        parameter.normal_(generator=generator)
    source = PersistentPGD(optimizer=AdamAscent(lr=0.01, betas=(0.5, 0.9)), scope="per_sample_per_position", n_warmup=1)
    return ParameterDecomposition(
        target=target,
        sites={"0": 5, "2": 4},
        ci_fn=SharedMLP(hidden=[3]),
        losses={
            "faithfulness": FaithfulnessLoss(coeff=1.0),
            "persistent": ReconstructionLoss(coeff=1.0, source=source, routing=AllSites(), comparison=OutputMSE()),
        },
    )


class Batches:
    """Each takes its time to fetch."""

    def __init__(self, batch: Tensor, clock: SimpleNamespace) -> None:
        self.batch, self.clock = batch, clock

    def __iter__(self) -> Any:
        while True:
            self.clock.now += FETCH
            yield self.batch


class Slow(Evaluation):
    def __init__(self, clock: SimpleNamespace) -> None:
        super().__init__()
        object.__setattr__(self, "clock", clock)

    def update(self, observation: Any) -> None:
        self.clock.now += EVALUATION  # type: ignore[attr-defined]

    def compute(self) -> dict[str, Tensor]:
        return {"": torch.zeros(())}


class SlowSaving(AtomicCheckpointIO):
    clock: SimpleNamespace

    def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        self.clock.now += SAVING
        super().save_checkpoint(*arguments, **options)


class Winding(lightning.Callback):
    """The time of a step passes in its backward; a first step compiles."""

    def __init__(self, clock: SimpleNamespace) -> None:
        self.clock = clock

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        self.clock.now += STEP if trainer.global_step > 0 else 50.0


def fit(module: ParameterDecomposition, batches: Any, *callbacks: Any, **trainer: Any) -> None:
    defaults: dict[str, Any] = {
        "max_steps": 12, "log_every_n_steps": 3, "logger": False, "enable_checkpointing": False,
        "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "inference_mode": False,
    }  # fmt: skip
    lightning.Trainer(callbacks=list(callbacks), **defaults | trainer).fit(module, batches)


def logged(csv: MetricsCSV) -> dict[int, dict[str, float]]:
    found = {
        step: {k.removeprefix("throughput/"): v for k, v in row.items() if k.startswith("throughput/")}
        for step, row in csv.rows.items()
    }
    return {step: values for step, values in found.items() if values}


def test_evaluations_checkpoints_and_the_first_step_are_no_training_time(clock: SimpleNamespace, tmp_path: Any):
    csv, saving = MetricsCSV(path=tmp_path / "metrics.csv"), SlowSaving()
    saving.clock = clock
    batch = torch.rand(6, 4)
    evaluate = Evaluate(metrics={"slow": Slow(clock)}, slow_metrics={}, every=4, slow_every=4, batches=[batch])
    checkpoint = RunCheckpoint(folder=tmp_path / "checkpoints", every=5, kept=2, config={})
    fit(
        decomposition(), Batches(batch, clock), Throughput(), evaluate, checkpoint, Winding(clock),
        logger=csv, plugins=[saving], enable_checkpointing=True,
    )  # fmt: skip
    rows = logged(csv)
    assert list(rows) == [3, 6, 9, 12]
    # Without the fetches after the evaluations of 4 and 8, and the checkpoints of 5 and 10.
    seconds = {3: 2 * (STEP + FETCH), 6: 3 * STEP + FETCH, 9: 3 * STEP + 2 * FETCH, 12: 3 * STEP + 2 * FETCH}
    for step, row in rows.items():
        n = 2 if step == 3 else 3
        assert row["steps_per_second"] == pytest.approx(n / seconds[step])
        assert row["samples_per_second"] == pytest.approx(6 * n / seconds[step])
        assert "tokens_per_second" not in row and "mfu" not in row


def test_the_clock_is_read_when_the_training_logs_or_stops_and_in_no_other_step(clock: SimpleNamespace):
    class Looks(Throughput):
        at: list[int] = []

        def read_clock(self, device: torch.device) -> None:
            self.at.append(self.step)
            super().read_clock(device)

    batch = torch.rand(6, 4)
    evaluate = Evaluate(metrics={}, slow_metrics={}, every=10, slow_every=10, batches=[batch])
    fit(decomposition(), Batches(batch, clock), Looks(), evaluate, max_steps=19, log_every_n_steps=8)
    assert Looks.at == [1, 8, 10, 16]


def test_an_accumulated_batch_is_one_step_of_many_samples(clock: SimpleNamespace, tmp_path: Any):
    csv = MetricsCSV(path=tmp_path / "metrics.csv")
    module = decomposition()
    del module.losses["persistent"], module.terms["persistent"]  # its sources take no parts of a batch
    module.persistent.clear()
    fit(
        module, Batches(torch.rand(6, 4), clock), Throughput(), Winding(clock),
        accumulate_grad_batches=2, max_steps=4, log_every_n_steps=2, logger=csv,
    )  # fmt: skip
    rows = logged(csv)
    assert list(rows) == [2, 4]
    assert rows[4]["samples_per_second"] == pytest.approx(6 / (STEP + FETCH))
    assert rows[4]["steps_per_second"] == pytest.approx(0.5 / (STEP + FETCH))


def test_tokens_and_flops_by_the_count_of_one_step(clock: SimpleNamespace, tmp_path: Any, monkeypatch: Any):
    monkeypatch.setattr(throughput, "peak_of", lambda device, precision: 5e4)
    csv, batch = MetricsCSV(path=tmp_path / "metrics.csv"), torch.arange(21).reshape(3, 7) % 10
    flops = DryDecomposition(decomposition(embedding=True), precision="32-true").cost(batch).flops
    fit(decomposition(embedding=True), Batches(batch, clock), Throughput(), Winding(clock), logger=csv)
    row = logged(csv)[6]
    assert row["tokens_per_second"] == pytest.approx(21 / (STEP + FETCH))
    assert row["tflops_per_second"] == pytest.approx(flops / (STEP + FETCH) / 1e12)
    assert row["mfu"] == pytest.approx(flops / (STEP + FETCH) / 5e4)
    assert 0.01 < row["peak_memory_gb"] < 100


@pytest.mark.parametrize("path", ["eager", "compiled"])
def test_not_one_bit_of_the_weights_is_other_with_the_callback(path: str):
    def trained(*callbacks: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = decomposition()
        if path == "compiled":  # all of a compiled step but the compiler
            module.compiled_step = module._compute_step
        batches = [torch.rand(6, 4) for _ in range(12)]
        fit(module, DataLoader(batches, batch_size=None), *callbacks)  # type: ignore[arg-type]
        return {**module.state_dict(), "generator": torch.get_rng_state()}

    alone, watched = trained(), trained(Throughput())
    assert any("held" in name for name in alone) and alone.keys() == watched.keys()
    assert all(torch.equal(x, watched[name]) for name, x in alone.items())


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H200", "bf16-mixed", 989),
        ("NVIDIA H100 80GB HBM3", "32-true", 67),
        ("NVIDIA H100 PCIe", "bf16-true", 756),
        ("NVIDIA A100-SXM4-80GB", "16-mixed", 312),
        ("NVIDIA A10G", "32-true", 31.2),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", 165),
        ("NVIDIA L40", "bf16-mixed", None),
        ("NVIDIA H200", "64-true", None),
    ],
)
def test_the_peak_of_a_card(
    name: str, precision: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    with caplog.at_level(logging.INFO):
        peak = throughput.peak_of(torch.device("cuda"), precision)
    assert peak == (None if tflops is None else tflops * 1e12)
    assert (f"no peak is known of {name!r}" in caplog.text) == (tflops is None)
