from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pdlightning.checkpoints import AtomicCheckpointIO, CheckpointError, latest_checkpoint


def checkpoint(value: float = 0.0, size: int = 1000) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((size,), value)}, "global_step": 3, "loops": {"fit": {"a": [1, None]}}}


def save(path: Path, value: float = 0.0) -> Path:
    AtomicCheckpointIO().save_checkpoint(checkpoint(value), path)
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def test_a_checkpoint_comes_back_equal(tmp_path: Path):
    path = save(tmp_path / "step=1.ckpt", 0.5)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["weight"], torch.full((1000,), 0.5))
    assert loaded["loops"] == {"fit": {"a": [1, None]}}


def test_a_full_disk_during_a_checkpoint_names_the_one_to_resume_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path / "step=900.ckpt")
    really_open = Path.open

    def cramped(path: Path, *args: Any, **kwargs: Any) -> Any:
        file = really_open(path, *args, **kwargs)
        return Cramped(file) if path.suffix == ".tmp" else file

    monkeypatch.setattr(Path, "open", cramped)
    with pytest.raises(CheckpointError) as error:
        save(tmp_path / "step=1000.ckpt")
    message = str(error.value)
    assert "step=1000.ckpt was not written" in message and "No space left" in message and "Free space" in message
    assert f"Resume from {tmp_path / 'step=900.ckpt'}" in message
    assert os.listdir(tmp_path) == ["step=900.ckpt"]


class Cramped:
    """A file on a disk with room for 1000 bytes."""

    def __init__(self, file: Any):
        self.file, self.written = file, 0

    def write(self, content: bytes) -> int:
        self.written += len(content)
        if self.written > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Cramped:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.mark.parametrize("place", [b"\x00\x00\x00\x3f" * 1000, b"global_step"])
def test_a_flipped_bit_in_the_weights_or_in_the_pickle_is_refused(tmp_path: Path, place: bytes):
    path = save(tmp_path / "step=1.ckpt", 0.5)
    content = path.read_bytes()
    start = content.index(place)
    for position in range(start, start + len(place), 1 + len(place) // 20):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="step=1.ckpt: its entry .* is corrupt"):
            AtomicCheckpointIO().load_checkpoint(path)


def test_a_truncated_checkpoint_is_refused_with_the_one_to_use_instead(tmp_path: Path):
    save(tmp_path / "step=900.ckpt")
    truncate(save(tmp_path / "step=950.ckpt"))
    truncate(save(tmp_path / "step=1000.ckpt"))
    with pytest.raises(CheckpointError) as error:
        AtomicCheckpointIO().load_checkpoint(tmp_path / "step=1000.ckpt")
    assert "step=1000.ckpt: it is truncated, unreadable or no checkpoint" in str(error.value)
    assert f"Resume from {tmp_path / 'step=900.ckpt'}" in str(error.value)


def test_a_missing_checkpoint_is_refused_with_a_sentence(tmp_path: Path):
    with pytest.raises(CheckpointError, match="there is no step=1.ckpt. No other complete checkpoint is in"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "step=1.ckpt")


class NotPlain:
    pass


def test_objects_are_refused_when_saved_and_when_loaded(tmp_path: Path):
    save(tmp_path / "step=1.ckpt")
    with pytest.raises(CheckpointError, match="step=1.ckpt was not written: only tensors and plain .*NotPlain"):
        AtomicCheckpointIO().save_checkpoint({"callbacks": NotPlain()}, tmp_path / "step=1.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "step=1.ckpt")["global_step"] == 3
    torch.save({"callbacks": NotPlain()}, tmp_path / "step=2.ckpt")
    with pytest.raises(
        CheckpointError,
        match=r"step=2.ckpt: it holds Python objects \([\w.]*NotPlain\), and .*do not load it",
    ):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "step=2.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint(tmp_path / "step=2.ckpt", weights_only=False)
    assert isinstance(loaded["callbacks"], NotPlain)


def test_the_latest_checkpoint_goes_by_number_and_is_found_from_the_run_folder(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    for step in (1000, 900, 20):
        save(folder / f"step={step}.ckpt")
    (folder / ".step=3000.ckpt.host-1-00ff00.tmp").write_text("half")
    (folder / "last.ckpt").write_text("")
    assert latest_checkpoint(tmp_path) == latest_checkpoint(folder) == folder / "step=1000.ckpt"


def test_a_second_version_of_a_step_is_later_than_the_first(tmp_path: Path):
    save(tmp_path / "epoch=0-step=5.ckpt")
    os.utime(tmp_path / "epoch=0-step=5.ckpt", (1, 1))
    save(tmp_path / "epoch=0-step=5-v1.ckpt")
    assert latest_checkpoint(tmp_path).name == "epoch=0-step=5-v1.ckpt"


def test_a_damaged_latest_checkpoint_is_passed_over_with_a_warning(tmp_path: Path):
    save(tmp_path / "step=900.ckpt")
    truncate(save(tmp_path / "step=1000.ckpt"))
    with pytest.warns(UserWarning, match="step=1000.ckpt: it is truncated.*falling back to the checkpoint before it"):
        assert latest_checkpoint(tmp_path).name == "step=900.ckpt"


def test_an_unfinished_sharded_checkpoint_is_passed_over(tmp_path: Path):
    for step in (1, 2):
        (tmp_path / f"step={step}.ckpt").mkdir()
        torch.save({}, tmp_path / f"step={step}.ckpt" / "meta.pt")
    (tmp_path / "step=1.ckpt" / ".metadata").write_text("")
    with pytest.warns(UserWarning, match="not finished"):
        assert latest_checkpoint(tmp_path).name == "step=1.ckpt"


def test_a_folder_without_a_checkpoint_says_what_was_looked_for_and_where(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text("")
    for folder, found in ((tmp_path, "['metrics.csv']"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(CheckpointError) as error:
            latest_checkpoint(folder)
        assert f"looked for step=<number>.ckpt in {folder} and found {found}" in str(error.value)


def test_a_folder_of_damaged_checkpoints_names_them(tmp_path: Path):
    truncate(save(tmp_path / "step=1.ckpt"))
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match=r"found \['step=1.ckpt: it is truncated"):
        warnings.simplefilter("ignore")
        latest_checkpoint(tmp_path)


class Line(lightning.LightningModule):
    def __init__(self, *, width: int):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_lightning_run_resumes_from_our_checkpoints_bit_identically(tmp_path: Path):
    def fit(steps: int, folder: Path, resume: Path | None = None) -> Tensor:
        torch.manual_seed(0)
        model = Line(width=2)
        saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", plugins=[AtomicCheckpointIO()], callbacks=[saver], logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        loader = DataLoader(torch.ones(4, 2), batch_size=2)  # type: ignore[arg-type]
        trainer.fit(model, loader, ckpt_path=resume)
        return model.layer.weight.detach()

    whole = fit(6, tmp_path / "whole")
    fit(4, tmp_path / "part")
    latest = latest_checkpoint(tmp_path / "part")
    assert latest.name == "step=4.ckpt"
    assert torch.equal(fit(6, tmp_path / "part", latest), whole)
