import copy

import pytest
import torch
from torch import nn

from pdlightning.targets import TMS


def test_output_is_the_relu_of_the_tied_maps():
    model = TMS(n_features=5, n_hidden=2, tied=True, seed=0)
    model.linear2.bias.data.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(1))
    W, b = model.linear1.weight, model.linear2.bias
    torch.testing.assert_close(model(x), torch.relu(x @ W.T @ W + b))


def test_identity_hidden_layers_change_nothing_and_are_not_trained():
    plain = TMS(n_features=5, n_hidden=2, tied=True, seed=0)
    deep = TMS(n_features=5, n_hidden=2, n_hidden_layers=2, hidden_layers_init="identity", tied=True, seed=0)
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(x), deep(x))
    assert not any(parameter.requires_grad for parameter in deep.hidden_layers.parameters())


def test_random_hidden_layers_are_used_and_trained():
    model = TMS(n_features=5, n_hidden=3, n_hidden_layers=1, hidden_layers_init="random", tied=False, seed=0)
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    H = model.hidden_layers[0].weight
    torch.testing.assert_close(model(x), torch.relu(x @ model.linear1.weight.T @ H.T @ model.linear2.weight.T))
    assert H.requires_grad


def test_tied_weight_follows_training_and_gets_the_gradient_of_both_uses():
    model = TMS(n_features=5, n_hidden=2, tied=True, seed=0)
    x = torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    W = model.linear1.weight.detach().clone().requires_grad_()
    torch.relu(x @ W.T @ W).sum().backward()
    model(x).sum().backward()
    torch.testing.assert_close(model.linear1.weight.grad, W.grad)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    torch.testing.assert_close(model.linear2.weight, (W - 0.1 * W.grad).T)


def test_tied_parameters_are_counted_and_stored_once():
    model = TMS(n_features=5, n_hidden=2, tied=True, seed=0)
    assert [name for name, _ in model.named_parameters()] == ["linear1.weight", "linear2.bias"]
    assert list(model.state_dict()) == ["linear1.weight", "linear2.bias"]


def test_a_copy_is_tied_to_itself():
    model = TMS(n_features=5, n_hidden=2, tied=True, seed=0)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.linear1.weight)
    assert not twin.linear2.weight.any() and model.linear2.weight.any()


def test_a_tied_use_may_be_replaced_without_the_other_noticing():
    model = TMS(n_features=5, n_hidden=2, tied=True, seed=0)
    assert isinstance(model.linear2, nn.Linear) and model.linear2.weight.shape == (5, 2)
    weight = model.linear1.weight.detach().clone()
    model.linear1 = nn.Identity()
    assert torch.equal(model.linear2.weight, weight.T)


def test_weights_are_keyed_by_the_seed_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    a, b, c = (TMS(n_features=5, n_hidden=2, tied=False, seed=seed).linear2.weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    # nn.Linear draws weights that are replaced at once; a caller's stream must not notice.
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_features": 0}, "n_features must be at least 1, got 0"),
        ({"n_hidden": 0}, "n_hidden must be at least 1, got 0"),
        ({"n_hidden_layers": -1}, "got -1"),
        ({"hidden_layers_init": "zeros"}, "identity or random, got 'zeros'"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        TMS(**{"n_features": 5, "n_hidden": 2, "tied": True, "seed": 0} | changes)
