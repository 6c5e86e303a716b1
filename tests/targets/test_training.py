import math

import pytest
import torch
from torch import nn

from pdlightning.data import AbsoluteLabels, SparseFeatures
from pdlightning.functional.schedules import schedule_value
from pdlightning.targets import TMS, TargetTraining, last_position_cross_entropy, train_target


def data(seed=0):
    return SparseFeatures(
        n_features=5,
        batch_size=32,
        eval_batches=1,
        seed=seed,
        generation="at_least_zero",
        probability=0.3,
        value_range=(0.0, 1.0),
        labels=AbsoluteLabels(),
    )


def training(**changes):
    arguments = {
        "model": TMS(n_features=5, n_hidden=2, n_hidden_layers=1, tied=True, seed=0),
        "loss": nn.functional.mse_loss,
        "steps": 12,
        "lr": 1e-2,
        "schedule": "cosine",
        "warmup_frac": 0.25,
        "weight_decay": 0.01,
    }
    return TargetTraining(**arguments | changes)


def test_training_is_adamw_on_the_batches_in_order_under_the_schedule():
    plain = training().model
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], weight_decay=0.01)
    for step in range(12):
        x, label = data().batch(step)
        loss = ((plain(x) - label) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = schedule_value(step, 12, 1e-2, "cosine", 0.25, 0.0)
        optimizer.step()
    module = training()
    last = train_target(module, data())
    assert last == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_training_is_repeatable_leaves_the_global_generator_alone_and_gives_the_data_back():
    state = torch.get_rng_state()
    first, second, source = training(), training(), data()
    train_target(first, source)
    torch.rand(7)
    torch.set_rng_state(state)
    train_target(second, data())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert torch.equal(next(iter(source.train_dataloader()))[0], data().batch(0)[0])


def test_a_fixed_layer_stays_as_it_is():
    module = training()
    train_target(module, data())
    assert torch.equal(module.model.hidden_layers[0].weight, torch.eye(2))


def test_a_diverged_training_is_an_error_that_says_what_to_do():
    module = training(loss=lambda y, label: (y * math.inf).mean())
    with pytest.raises(ValueError, match=r"ended with loss (nan|inf): lower its lr, now 0.01"):
        train_target(module, data())


def test_cross_entropy_is_that_of_the_last_position_alone():
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([1, 0, 4])
    expected = -sum(math.log(logits[b, 3].softmax(-1)[label[b]]) for b in range(3)) / 3
    assert last_position_cross_entropy(logits, label).item() == pytest.approx(expected, rel=1e-5)
