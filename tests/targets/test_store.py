import dataclasses
import json
import multiprocessing
from functools import partial

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from pdlightning.data import AbsoluteLabels, SparseFeatures
from pdlightning.targets import TMS, CheckResult, TargetRecipe, UnfitTargetError, obtain_target

CONFIG = {"target": "small", "steps": 5}


def passes(model, data):
    return CheckResult(True, "fine", {"loss": 0.5})


def only_seed_2_passes(model, data):
    return CheckResult(data.seed == 2, f"judged seed {data.seed}", {})


def small_figure(model, data):
    return {"weights": Figure()}


def recipe(**changes):
    arguments = {
        "model": partial(TMS, n_features=3, n_hidden=2, n_hidden_layers=1, tied=True),
        "data": partial(
            SparseFeatures,
            n_features=3,
            batch_size=8,
            eval_batches=1,
            generation="at_least_zero",
            probability=0.5,
            value_range=(0.0, 1.0),
            labels=AbsoluteLabels(),
        ),
        "loss": nn.functional.mse_loss,
        "check": passes,
        "figures": small_figure,
        "steps": 5,
        "lr": 1e-2,
        "schedule": "constant",
        "warmup_frac": 0.0,
        "weight_decay": 0.0,
        "seed": 0,
        "max_attempts": 3,
    }
    return TargetRecipe(**arguments | changes)


def obtain(folder, **changes):
    return obtain_target(recipe(**changes), config=CONFIG, cache_dir=folder)


def untrainable(**_):
    raise AssertionError("trained although the target was stored")


def same_weights(a, b):
    return all(torch.equal(p, b.state_dict()[name]) for name, p in a.state_dict().items())


def test_a_target_is_trained_once_and_found_again(tmp_path):
    first = obtain(tmp_path)
    again = obtain(tmp_path, data=untrainable)
    assert same_weights(first.model, again.model)
    assert again.folder == first.folder and again.summary == first.summary
    assert not same_weights(first.model, TMS(n_features=3, n_hidden=2, n_hidden_layers=1, tied=True, seed=0))


def test_trained_and_loaded_targets_are_frozen_and_in_eval_mode(tmp_path):
    for result in (obtain(tmp_path), obtain(tmp_path)):
        assert not any(parameter.requires_grad for parameter in result.model.parameters())
        assert not any(module.training for module in result.model.modules())


def test_the_folder_has_weights_record_and_figures(tmp_path):
    folder = obtain(tmp_path).folder
    assert {path.name for path in folder.iterdir()} == {"weights.safetensors", "target.json", "weights.png"}
    record = json.loads((folder / "target.json").read_text())
    assert record["config"] == CONFIG and record["summary"]["measures"] == {"loss": 0.5}


def test_another_config_is_another_target(tmp_path):
    other = obtain_target(recipe(seed=1), config=CONFIG | {"seed": 1}, cache_dir=tmp_path)
    assert other.folder != obtain(tmp_path).folder and not same_weights(other.model, obtain(tmp_path).model)


def test_the_cache_stands_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PDLIGHTNING_CACHE", str(tmp_path / "elsewhere"))
    assert obtain(None).folder.is_relative_to(tmp_path / "elsewhere")


def test_a_failed_check_is_reported_and_the_next_seed_tried(tmp_path):
    with pytest.warns(UserWarning, match="judged seed") as warned:
        result = obtain(tmp_path, check=only_seed_2_passes)
    assert ["attempt 1 of 3" in str(w.message) for w in warned][0] and "judged seed 1" in str(warned[1].message)
    assert result.summary["seed"] == 2 and result.summary["attempt"] == 3
    assert result.summary["failed_attempts"] == ["seed 0: judged seed 0", "seed 1: judged seed 1"]
    again = obtain(tmp_path, check=only_seed_2_passes, data=untrainable)
    assert same_weights(result.model, again.model)


@pytest.mark.filterwarnings("ignore:Target attempt")
def test_a_target_that_never_passes_is_an_error_and_is_not_stored(tmp_path):
    with pytest.raises(UnfitTargetError, match=r"None of 2 .*judged seed 0.*judged seed 1.*max_attempts"):
        obtain(tmp_path, check=only_seed_2_passes, max_attempts=2)
    assert not [path for path in (tmp_path / "targets").iterdir() if path.is_dir()]


@pytest.mark.parametrize("damage", ["truncated weights", "flipped byte", "no record", "half a record", "newer format"])
def test_a_damaged_entry_is_reported_and_trained_again(tmp_path, damage):
    first = obtain(tmp_path)
    weights, record = first.folder / "weights.safetensors", first.folder / "target.json"
    content = weights.read_bytes()
    if damage == "truncated weights":
        weights.write_bytes(content[:-4])
    elif damage == "flipped byte":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no record":
        record.unlink()
    elif damage == "half a record":
        record.write_text(record.read_text()[:50])
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"format_version": 99}))
    with pytest.warns(UserWarning, match=rf"{first.folder} is damaged .* trained again"):
        rebuilt = obtain(tmp_path)
    assert same_weights(first.model, rebuilt.model)
    assert same_weights(first.model, obtain(tmp_path, data=untrainable).model)


def test_figures_that_fail_leave_no_half_written_entry(tmp_path):
    class Unwritable(Figure):
        def savefig(self, *arguments, **options):
            raise OSError(28, "No space left on device")

    with pytest.raises(Exception, match="No space left"):
        obtain(tmp_path, figures=lambda model, data: {"a": Unwritable()})
    assert obtain(tmp_path).summary["attempt"] == 1


def obtain_and_report(folder, queue):
    torch.set_num_threads(1)
    result = obtain(folder)
    queue.put(result.summary["seconds"])


def test_processes_that_want_one_target_at_once_train_it_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=obtain_and_report, args=(tmp_path, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    seconds = {queue.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(seconds) == 1


def test_a_recipe_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="max_attempts of a target recipe must be positive, got 0"):
        dataclasses.replace(recipe(), max_attempts=0)
