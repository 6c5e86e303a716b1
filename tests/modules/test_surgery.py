"""Finding sites, putting them in place, and taking the target back (spec C1, C7, C8)."""

from __future__ import annotations

import copy

import pytest
import torch
from parity import Chain, frozen, seeded
from torch import Tensor, nn

from pdlightning.modules import ComponentModel, SharedMLP
from pdlightning.targets import TMS


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


def two_blocks() -> Chain:
    return frozen(Chain({"a": Block(), "b": Block()}))


def decomposed(target: nn.Module, sites: dict[str, int]) -> ComponentModel:
    return ComponentModel(target=target, sites=sites, ci_fn=SharedMLP(hidden=[2]))


@pytest.mark.parametrize(
    "sites",
    [
        {"*.up": 2, "?.down": 3},
        {"a.pre_identity": 2, "a.up": 3},
        {"a.up.pre_identity": 2, "a.up": 3},
        {"a.pre_identity": 2, "a.up.pre_identity": 2, "a.up": 3, "*.down": 2},
    ],
)
def test_restore_gives_the_very_target_back(sites: dict[str, int]) -> None:
    target, x = two_blocks(), torch.randn(5, 3, generator=seeded(0))
    modules, before = dict(target.named_modules()), target(x)
    model = decomposed(target, sites)
    assert torch.equal(target(x), before), "outside a pass a site is its module"
    assert torch.equal(model.clean(x).output, before)
    assert model.restore() is target
    assert dict(target.named_modules()) == modules
    assert torch.equal(target(x), before)
    decomposed(target, sites)


def test_identities_in_front_of_modules_in_one_another() -> None:
    target, x = (
        frozen(Chain({"a": Chain({"b": Chain({"c": nn.Linear(3, 3)})})})),
        torch.randn(5, 3, generator=seeded(0)),
    )
    modules, before = dict(target.named_modules()), target(x)
    model = decomposed(target, {"a*.pre_identity": 2})
    assert torch.equal(model.clean(x).output, before)
    assert dict(model.restore().named_modules()) == modules


def test_sites_come_in_the_order_of_the_target_and_inputs_are_theirs() -> None:
    model = decomposed(two_blocks(), {"b.*p": 2, "a.down": 3, "a.pre_identity": 4})
    assert list(model.components) == ["a.pre_identity", "a.down", "b.up"]
    assert [c.C for c in model.components.values()] == [4, 3, 2]
    x = torch.randn(5, 3, generator=seeded(0))
    assert torch.equal(model.clean(x).inputs["a.pre_identity"], x)


def test_a_wildcard_may_sweep_up_containers_on_the_way_to_their_leaves() -> None:
    target = Chain({"a": Chain({"x": nn.Linear(3, 3), "y": nn.Linear(3, 3)})}).requires_grad_(False)
    assert list(decomposed(target, {"*": 2}).components) == ["a.x", "a.y"]


def test_a_weight_used_by_two_modules_is_decomposed_twice() -> None:
    embed, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embed.weight
    model = decomposed(Chain({"embed": embed, "head": head}).requires_grad_(False), {"*": 2})
    first, second = model.components["embed"], model.components["head"]
    assert first.target_weight.data_ptr() == second.target_weight.data_ptr()
    assert torch.equal(first.target_weight, second.target_weight.T)
    assert not torch.equal(first.V.detach(), second.U.T.detach())
    assert len(list(model.components.parameters())) == 4
    masks = {"head": torch.zeros(4, 2)}
    assert torch.equal(model.masked(torch.tensor([0, 1, 2, 3]), masks).output, torch.zeros(4, 5))


class Functional(nn.Module):
    """A target whose code reads from its own parts: a head tied as a function, and a mark on a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(5, 3), Block()
        self.layer.scale = 2.0  # type: ignore[assignment]

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.layer(self.embed(tokens)) * self.layer.scale
        return nn.functional.linear(h, self.embed.weight)


def test_a_target_may_read_attributes_of_the_modules_that_became_sites() -> None:
    target, tokens = Functional().requires_grad_(False), torch.arange(5)
    before = target(tokens)
    model = decomposed(target, {"embed": 2, "layer.pre_identity": 2, "layer.up": 2})
    assert torch.equal(model.clean(tokens).output, before)
    assert torch.equal(copy.deepcopy(model).clean(tokens).output, before)
    with pytest.raises(AttributeError, match="'Embedding' object has no attribute 'nope'"):
        _ = target.embed.nope


def test_a_tied_toy_is_decomposed_untied() -> None:
    target = TMS(n_features=5, n_hidden=2, tied=True, seed=0).requires_grad_(False)
    x = torch.rand(4, 5, generator=seeded(0))
    before = target(x)
    model = decomposed(target, {"linear1": 3, "linear2": 4})
    assert torch.equal(model.clean(x).output, before)
    assert torch.equal(model.components["linear2"].target_weight, model.components["linear1"].target_weight.T)
    assert [tuple(c.V.shape) for c in model.components.values()] == [(5, 3), (2, 4)]
    assert torch.equal(model.restore()(x), before)


def test_one_module_at_two_paths_makes_two_sites() -> None:
    linear = nn.Linear(3, 3)
    model = decomposed(Chain({"a": linear, "b": linear}).requires_grad_(False), {"a": 2, "b": 2})
    assert not torch.equal(model.components["a"].V, model.components["b"].V)
    assert model.restore()["a"] is linear and model.target["b"] is linear  # type: ignore[index]


def test_copies_are_independent_and_whole() -> None:
    model = decomposed(two_blocks(), {"*.up": 2})
    twin, x = copy.deepcopy(model), torch.randn(2, 3, generator=seeded(0))
    masks = {"a.up": torch.ones(2, 2)}
    before = model.masked(x, masks).output
    assert torch.equal(twin.masked(x, masks).output, before)
    twin.components["a.up"].V.data.zero_()
    assert torch.equal(model.masked(x, masks).output, before)
    assert not torch.equal(twin.masked(x, masks).output, before), "the copied sites read the copied components"
    assert twin.components["a.up"]._frozen[0] is twin.target["a"].up.module is not model.target["a"].up.module  # type: ignore[index]


@pytest.mark.parametrize(
    ("sites", "error", "said"),
    [
        ({}, ValueError, "No sites.*sites={"),
        ({"nope": 2}, ValueError, r"'nope' matches no module.*a\.up, a\.down, b\.up, b\.down"),
        ({"nope.pre_identity": 2}, ValueError, r"'nope\.pre_identity' matches no module"),
        ({"a.up": 2, "*.up": 3}, ValueError, r"'a\.up' is matched by two patterns, 'a\.up' and '\*\.up'"),
        ({"a.act": 2}, TypeError, r"'a\.act', a ReLU.*nn\.Linear.*Conv1D.*nn\.Embedding.*pre_identity"),
        ({"a": 2}, TypeError, r"'a', a Block, which cannot be decomposed"),
        ({"a.act.pre_identity": 2}, TypeError, r"identity in front of 'a\.act', a ReLU"),
        ({"a.up": 0}, ValueError, r"sites\['a\.up'\]: C.*integer >= 1, got 0"),
        ({"a.up": 2.5}, ValueError, "got 2.5"),
        ({"a.up": True}, ValueError, "got True"),
    ],
)
def test_impossible_sites_are_refused_before_the_target_is_touched(sites: dict, error: type, said: str) -> None:
    target = two_blocks()
    modules = dict(target.named_modules())
    with pytest.raises(error, match=said):
        decomposed(target, sites)
    assert dict(target.named_modules()) == modules


class Scaled(nn.Embedding):
    """As Gemma's: what it gives is not a row of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_module_whose_weight_does_not_say_what_it_computes_is_refused() -> None:
    target = Chain({"plain": nn.Embedding(5, 3), "scaled": Scaled(5, 3)}).requires_grad_(False)
    with pytest.raises(TypeError, match=r"'scaled', a Scaled, which cannot be decomposed.*the forward of its class"):
        decomposed(target, {"*": 2})
    with pytest.raises(ValueError, match=r"can be decomposed: plain\."):
        decomposed(target, {"nope": 2})


def test_two_paths_through_one_shared_block_cannot_each_have_a_site() -> None:
    block = Block()
    with pytest.raises(ValueError, match=r"'a\.up' and 'b\.up' are one place: the module 'b'.*used twice"):
        decomposed(Chain({"a": block, "b": block}).requires_grad_(False), {"*.up": 2})


def test_a_site_that_runs_twice_in_one_forward_is_an_error() -> None:
    linear = Chain({"a": nn.Linear(3, 3)}).requires_grad_(False)
    model = ComponentModel(
        target=linear, sites={"a": 2}, ci_fn=SharedMLP(hidden=[2]), run_batch=lambda target, x: target(target(x))
    )
    with pytest.raises(RuntimeError, match="'a' ran twice in one forward"):
        model.clean(torch.ones(2, 3))


def test_a_site_that_never_runs_is_an_error_that_names_it() -> None:
    model = ComponentModel(
        target=two_blocks(), sites={"*.up": 2}, ci_fn=SharedMLP(hidden=[2]), run_batch=lambda target, x: target["a"](x)
    )
    with pytest.raises(RuntimeError, match=r"never ran the sites \['b\.up'\]"):
        model.causal_importances(model.clean(torch.ones(2, 3)))


def test_a_trainable_target_and_one_with_sites_are_refused() -> None:
    target = two_blocks()
    target["b"].up.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 of its parameters.*b\.up\.bias.*requires_grad_\(False\)"):
        decomposed(target, {"a.up": 2})
    target.requires_grad_(False)
    decomposed(target, {"a.up": 2})
    with pytest.raises(ValueError, match=r"already has sites.*restore\(\)"):
        decomposed(target, {"b.up": 2})


def test_only_subcomponents_and_the_ci_function_train() -> None:
    model = decomposed(two_blocks(), {"*.up": 2})
    names = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"components", "ci_fn"}
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_an_unknown_site_is_answered_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"No site 'x'.*a\.up, b\.up"):
        decomposed(two_blocks(), {"*.up": 2}).components["x"]


def test_identity_sites_have_the_precision_of_the_module_behind_them() -> None:
    model = decomposed(two_blocks().double(), {"a.pre_identity": 2})
    c = model.components["a.pre_identity"]
    assert c.V.dtype == c.U.dtype == c.target_weight.dtype == torch.float64
    assert torch.equal(c.target_weight, torch.eye(3).double())
