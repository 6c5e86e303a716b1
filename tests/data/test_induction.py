import pytest
import torch

from pdlightning.data import InductionTokens


def sequences(**changes):
    arguments = {
        "vocab": 20,
        "length": 12,
        "prefix_window": 5,
        "batch_size": 5000,
        "eval_batches": 1,
        "seed": 0,
    }
    return InductionTokens(**arguments | changes)


def test_every_sequence_is_bos_letters_s_m_letters_s_and_its_label_is_m():
    tokens, label = sequences().batch(0)
    assert tokens.dtype == label.dtype == torch.int64 and tokens.shape == (5000, 12)
    for row, wanted in zip(tokens.tolist()[:500], label.tolist(), strict=False):
        assert row[0] == 19 and row.count(19) == 1
        assert row[-1] == 18 and row.count(18) == 2
        assert row[row.index(18) + 1] == wanted < 18


@pytest.mark.parametrize("prefix_window", [1, 5, 9])
def test_the_first_s_is_uniform_over_the_window(prefix_window):
    tokens, _ = sequences(prefix_window=prefix_window).batch(0)
    counts = torch.bincount((tokens == 18).int().argmax(-1), minlength=12)
    assert counts.nonzero().flatten().tolist() == list(range(1, prefix_window + 1))
    assert (counts[1 : prefix_window + 1] / 5000 - 1 / prefix_window).abs().max() < 0.04


def test_labels_are_uniform_over_the_letters():
    _, label = sequences().batch(0)
    assert (torch.bincount(label, minlength=18) / 5000 - 1 / 18).abs().max() < 0.02


def test_batches_are_functions_of_seed_stream_and_step():
    data = sequences(batch_size=64)
    assert torch.equal(data.batch(2)[0], sequences(batch_size=128).batch(2)[0][:64])
    others = [data.batch(3), data.batch(2, "eval"), sequences(batch_size=64, seed=1).batch(2)]
    assert all((data.batch(2)[0] != other[0]).any(-1).all() for other in others)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": 3}, "at least 4 .* got 3"),
        ({"length": 3, "prefix_window": 1}, "at least 4 .* got 3"),
        ({"prefix_window": 10}, r"1..9 for length 12.*got 10"),
        ({"prefix_window": 0}, "got 0"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        sequences(**changes)
