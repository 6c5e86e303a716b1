import math

import pytest
import torch

from pdlightning.targets import InductionTransformer
from pdlightning.targets.induction import sinusoids


def model(**changes):
    arguments = {"vocab": 11, "length": 8, "d_model": 6, "n_layers": 2, "n_heads": 2, "seed": 0}
    return InductionTransformer(**arguments | changes)


def tokens(*shape):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(0))


def naive_logits(net, row):
    """One position, head and key at a time."""
    r = torch.stack([net.embed.weight[token] + net.positions[t] for t, token in enumerate(row)])
    for layer in net.layers:
        attn, added = layer.attn, torch.zeros_like(r)
        q, k, v = (r @ w.weight.T for w in (attn.q_proj, attn.k_proj, attn.v_proj))
        for t in range(len(row)):
            z = torch.zeros(6)
            for head in (slice(0, 3), slice(3, 6)):
                weights = torch.tensor([math.exp(q[t, head] @ k[s, head] / math.sqrt(3)) for s in range(t + 1)])
                z[head] = (weights / weights.sum()) @ v[: t + 1, head]
            added[t] = attn.o_proj.weight @ z
        r = r + added
    return r @ net.unembed.weight.T


@torch.no_grad()
def test_logits_match_a_naive_transformer():
    net, rows = model(), tokens(2, 7)
    torch.testing.assert_close(net(rows), torch.stack([naive_logits(net, row) for row in rows]))


@torch.no_grad()
def test_no_position_sees_a_later_token():
    net, rows = model(), tokens(1, 8)
    changed = rows.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    same = (net(rows) == net(changed)).all(-1)[0]
    assert same[:5].all() and not same[5:].any()


@torch.no_grad()
def test_attention_patterns_are_causal_probabilities_of_every_layer():
    patterns = model().attention_patterns(tokens(3, 8))
    assert [tuple(pattern.shape) for pattern in patterns] == [(3, 2, 8, 8)] * 2
    for pattern in patterns:
        torch.testing.assert_close(pattern.sum(-1), torch.ones(3, 2, 8))
        assert not pattern.triu(1).any()


def test_leading_axes_are_free():
    net, rows = model(), tokens(2, 3, 5)
    torch.testing.assert_close(net(rows)[1, 2], net(rows[1, 2]))


def test_sinusoids_are_the_published_ones():
    table = sinusoids(50, 16)
    for t, i in [(0, 0), (7, 0), (31, 3), (49, 7)]:
        angle = t / 10000 ** (2 * i / 16)
        assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_weights_are_keyed_by_the_seed():
    state = torch.get_rng_state()
    a, b, c = model(), model(), model(seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_a_sequence_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="9 tokens.*at most 8"):
        model()(tokens(1, 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"d_model": 5, "n_heads": 1}, "even .* got 5"),
        ({"d_model": 8, "n_heads": 3}, "multiple of n_heads 3, got 8"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)
