import pytest
import torch

from pdlightning.data import AbsoluteLabels, InductionTokens, ResidualActivationLabels, SparseFeatures
from pdlightning.targets import FeaturesRepresented, LastPositionAccuracy


def features(labels):
    return SparseFeatures(
        n_features=4,
        batch_size=8,
        eval_batches=1,
        seed=0,
        generation="at_least_zero",
        probability=0.5,
        value_range=(-1.0, 1.0),
        labels=labels,
    )


def test_a_model_that_says_the_labels_passes():
    labels = ResidualActivationLabels(n_features=4, activation="gelu", coefficient_range=(1.0, 2.0), seed=0)
    result = FeaturesRepresented(values=[1.0, -1.0], tolerance=1e-6)(labels, features(labels))
    assert result.passed and result.measures["worst_own_error"] == 0


def test_dropped_features_are_named_with_how_far_they_are_off():
    keep = torch.tensor([1.0, 0.0, 0.95, 0.5])
    result = FeaturesRepresented(values=[1.0], tolerance=0.1)(lambda x: x * keep, features(AbsoluteLabels()))
    assert not result.passed
    assert "2 of 4 features not represented: 1 (off by 1.000), 3 (off by 0.500)" in result.message
    assert result.measures["mean_own_error"] == pytest.approx((1 + 0.05 + 0.5) / 4)


def test_every_value_counts():
    data = features(AbsoluteLabels())
    assert FeaturesRepresented(values=[1.0], tolerance=0.1)(torch.relu, data).passed
    assert not FeaturesRepresented(values=[1.0, -1.0], tolerance=0.1)(torch.relu, data).passed


def test_interference_is_measured_and_does_not_decide():
    result = FeaturesRepresented(values=[1.0], tolerance=0.1)(
        lambda x: x + 0.3 * x.roll(1, -1), features(AbsoluteLabels())
    )
    assert result.passed and result.measures["worst_interference"] == pytest.approx(0.3)


def test_an_output_that_is_not_a_number_does_not_pass():
    check = FeaturesRepresented(values=[1.0], tolerance=0.1)
    assert not check(lambda x: x * torch.nan, features(AbsoluteLabels())).passed


def test_accuracy_is_that_of_the_last_position_over_the_eval_batches():
    data = InductionTokens(vocab=8, length=10, prefix_window=7, batch_size=500, eval_batches=3, seed=0)

    def copies_the_third_token(tokens):
        logits = torch.zeros(*tokens.shape, 8)
        logits[:, -1] = torch.nn.functional.one_hot(tokens[:, 2], 8).float()
        return logits

    # Right where the first S stands at 1 (a seventh), by chance elsewhere, never where S stands at 2.
    expected = 1 / 7 + 5 / 7 / 6
    result = LastPositionAccuracy(at_least=0.3)(copies_the_third_token, data)
    assert not result.passed and result.measures["accuracy"] == pytest.approx(expected, abs=0.05)
    assert LastPositionAccuracy(at_least=0.15)(copies_the_third_token, data).passed


def test_wrong_arguments_are_refused_with_what_was_expected():
    with pytest.raises(ValueError, match="other than 0"):
        FeaturesRepresented(values=[0.0], tolerance=0.1)
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        FeaturesRepresented(values=[1.0], tolerance=0)
    with pytest.raises(ValueError, match="give SparseFeatures its labels"):
        FeaturesRepresented(values=[1.0], tolerance=0.1)(torch.abs, features(None))
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 95"):
        LastPositionAccuracy(at_least=95)
