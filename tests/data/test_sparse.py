import pytest
import torch
from lightning import Trainer
from recorder import Recorder

from pdlightning.data import AbsoluteLabels, ResidualActivationLabels, SparseFeatures
from pdlightning.data.sparse import ACTIVE


def features(**changes):
    arguments = {
        "n_features": 6,
        "batch_size": 4096,
        "eval_batches": 2,
        "seed": 0,
        "generation": "at_least_zero",
        "probability": 0.2,
        "value_range": (-1.0, 1.0),
    }
    return SparseFeatures(**arguments | changes)


def test_features_are_active_with_their_probability_and_independently():
    active = (features(batch_size=50_000).batch(0) != 0).double()
    # Five standard errors of a frequency, and of a product of two.
    assert torch.allclose(active.mean(0), torch.full((6,), 0.2).double(), atol=5 * (0.16 / 50_000) ** 0.5)
    together = active.T @ active / 50_000
    expected = torch.full((6, 6), 0.04).double()
    assert (together - expected).fill_diagonal_(0).abs().max() < 5 * (0.04 * 0.96 / 50_000) ** 0.5


def test_values_are_uniform_in_their_range_and_independent_of_being_active():
    x = features(batch_size=50_000, value_range=(2.0, 3.0)).batch(0)
    values = x[x != 0]
    assert values.min() >= 2 and values.max() < 3
    quantiles = values.quantile(torch.tensor([0.1, 0.5, 0.9]))
    assert torch.allclose(quantiles, torch.tensor([2.1, 2.5, 2.9]), atol=0.01)


@pytest.mark.parametrize("generation", list(ACTIVE))
def test_exactly_k_features_are_active_each_equally_often(generation):
    k = ACTIVE[generation]
    active = features(generation=generation, probability=None, batch_size=20_000).batch(3) != 0
    assert (active.sum(-1) == k).all()
    assert torch.allclose(active.double().mean(0), torch.full((6,), k / 6).double(), atol=0.02)


def test_synced_features_are_active_together_with_values_of_their_own():
    x = features(synced=[[0, 4], [5, 2]]).batch(0)
    active = x != 0
    assert torch.equal(active[:, 0], active[:, 4]) and torch.equal(active[:, 2], active[:, 5])
    assert not torch.equal(active[:, 0], active[:, 1]) and not torch.equal(active[:, 0], active[:, 2])
    both = active[:, 0]
    assert torch.corrcoef(x[both][:, [0, 4]].T)[0, 1].abs() < 0.15
    assert active.double().mean(0).sub(0.2).abs().max() < 0.04


def test_a_sample_depends_on_its_index_alone_not_on_the_batch_around_it():
    small, large = features(batch_size=8), features(batch_size=64)
    assert torch.equal(small.batch(7), large.batch(7)[:8])


def test_batches_differ_between_steps_streams_and_seeds_and_repeat_within():
    data = features()
    assert torch.equal(data.batch(5), features().batch(5))
    others = [data.batch(6), data.batch(5, "eval"), features(seed=1).batch(5)]
    assert all((data.batch(5) != other).any(-1).double().mean() > 0.5 for other in others)


def test_making_batches_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    list(features().val_dataloader())
    next(iter(features().train_dataloader()))
    assert torch.equal(state, torch.get_rng_state())


def test_eval_batches_are_the_same_every_time():
    loader = features(eval_batches=3).val_dataloader()
    first, second = list(loader), list(loader)
    assert len(loader) == len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def fit(tmp_path, steps, ckpt_path=None, **options):
    module = Recorder()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, datamodule=features(batch_size=4), ckpt_path=ckpt_path)
    trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
    return module.seen


@pytest.mark.filterwarnings("ignore")
def test_training_sees_the_batches_in_order_and_a_resumed_run_goes_on(tmp_path):
    expected = [features(batch_size=4).batch(step) for step in range(5)]
    seen = fit(tmp_path, 3) + fit(tmp_path, 5, ckpt_path=tmp_path / "3.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_a_run_resumed_under_gradient_accumulation_repeats_no_batch(tmp_path):
    expected = [features(batch_size=4).batch(step) for step in range(8)]
    options = {"accumulate_grad_batches": 2}
    seen = fit(tmp_path, 2, **options) + fit(tmp_path, 4, ckpt_path=tmp_path / "2.ckpt", **options)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


class Rank:
    """What a KeyedDataModule asks of a trainer in a process group."""

    def __init__(self, rank, ranks):
        self.global_rank, self.world_size = rank, ranks
        self.strategy = type("Strategy", (), {"root_device": torch.device("cpu")})


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_out_the_batch_of_one_process(ranks):
    parts = []
    for rank in range(ranks):
        data = features(batch_size=16)
        data.trainer = Rank(rank, ranks)
        parts.append(data.batch(3))
    assert torch.equal(torch.cat(parts), features(batch_size=16).batch(3))


def test_a_batch_that_does_not_split_over_the_ranks_is_an_error():
    data = features(batch_size=10)
    data.trainer = Rank(0, 4)
    with pytest.raises(ValueError, match=r"batch_size 10 .* 4 ranks"):
        data.batch(0)


def test_labels_come_with_the_inputs():
    x, label = features(labels=AbsoluteLabels()).batch(0)
    assert torch.equal(x, features().batch(0)) and torch.equal(label, x.abs())


def test_residual_labels_are_the_input_plus_its_activation():
    labels = ResidualActivationLabels(n_features=3, activation="relu", coefficient_range=(1.0, 1.0), seed=0)
    x = torch.tensor([[0.5, -0.5, 0.0]])
    assert torch.equal(labels(x), torch.tensor([[1.0, -0.5, 0.0]]))


def test_label_coefficients_are_uniform_in_their_range_and_keyed():
    def coefficients(seed):
        labels = ResidualActivationLabels(n_features=2000, activation="relu", coefficient_range=(1.0, 2.0), seed=seed)
        return labels(torch.ones(1, 2000))[0] - 1

    c = coefficients(0)
    assert c.min() >= 1 and c.max() < 2 and (c.mean() - 1.5).abs() < 0.04
    assert torch.equal(c, coefficients(0)) and not torch.equal(c, coefficients(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_features": 0}, "n_features must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batches": 0}, "eval_batches must be at least 1, got 0"),
        ({"probability": 1.5}, r"probability in \[0, 1\], got 1.5"),
        ({"probability": None}, r"probability in \[0, 1\], got None"),
        ({"value_range": (1.0, 0.0)}, "low < high"),
        ({"generation": "exactly_six"}, "at_least_zero or one of exactly_one, .* got 'exactly_six'"),
        ({"generation": "exactly_one"}, "takes no probability"),
        ({"generation": "exactly_four", "probability": None, "n_features": 3}, "at least 4 features, got 3"),
        ({"synced": [[0, 6]]}, r"must lie in 0..5, got \[\[0, 6\]\]"),
        ({"synced": [[0, 1], [1, 2]]}, "disjoint"),
        ({"synced": [[0]]}, "at least 2 features"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        features(**changes)
