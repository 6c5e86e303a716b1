import pytest
import torch

from pdlightning.targets import ResidMLP


def model(**changes):
    arguments = {
        "n_features": 6,
        "d_embed": 16,
        "d_mlp": 4,
        "n_layers": 2,
        "embedding": "fixed_random",
        "activation": "relu",
        "in_bias": True,
        "out_bias": True,
        "seed": 0,
    }
    return ResidMLP(**arguments | changes)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_output_is_the_residual_stream_read_back(activation):
    net = model(activation=activation)
    act = getattr(torch.nn.functional, activation)
    for parameter in net.layers.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) - 0.5
    r = x @ net.W_E
    for layer in net.layers:
        hidden = act(r @ layer.mlp_in.weight.T + layer.mlp_in.bias)
        r = r + hidden @ layer.mlp_out.weight.T + layer.mlp_out.bias
    torch.testing.assert_close(net(x), r @ net.W_E.T)


def test_sites_have_their_names_and_layout():
    shapes = {name: tuple(parameter.shape) for name, parameter in model(in_bias=False).named_parameters()}
    assert shapes["layers.0.mlp_in.weight"] == (4, 16) and shapes["layers.1.mlp_out.weight"] == (16, 4)
    assert "layers.0.mlp_in.bias" not in shapes and shapes["layers.0.mlp_out.bias"] == (16,)


def test_a_fixed_random_embedding_has_unit_rows_is_its_own_unembedding_and_is_not_trained():
    net = model(d_embed=1000)
    torch.testing.assert_close(net.W_E.norm(dim=-1), torch.ones(6))
    assert (net.W_E @ net.W_E.T - torch.eye(6)).abs().max() < 0.2
    assert torch.equal(net.W_U, net.W_E.T) and not net.W_E.requires_grad


def test_a_fixed_identity_embedding_is_the_identity():
    net = model(embedding="fixed_identity", d_embed=6)
    assert torch.equal(net.W_E, torch.eye(6)) and torch.equal(net.W_U, torch.eye(6))
    with pytest.raises(ValueError, match="d_embed == n_features, got 16 and 6"):
        model(embedding="fixed_identity")


def test_a_learned_embedding_and_unembedding_are_trained_each_on_its_own():
    net = model(embedding="learned")
    net(torch.ones(2, 6)).sum().backward()
    assert net.W_E.grad is not None and net.W_U.grad is not None
    net.W_E.data.zero_()
    assert net.W_U.any()


def test_weights_are_keyed_by_the_seed_and_layers_differ():
    state = torch.get_rng_state()
    a, b, c = model(), model(), model(seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.W_E, c.W_E)
    assert not torch.equal(a.layers[0].mlp_in.weight, a.layers[1].mlp_in.weight)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"d_mlp": -3}, "d_mlp must be at least 1, got -3"),
        ({"embedding": "random"}, "fixed_random, fixed_identity or learned, got 'random'"),
        ({"activation": "tanh"}, "relu or gelu, got 'tanh'"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)
