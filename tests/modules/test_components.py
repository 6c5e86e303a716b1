"""Sites against the oracle: every kind, masked, routed, with and without the delta (spec 2)."""

from __future__ import annotations

import math
from collections import Counter

import naive
import pytest
import torch
from parity import assert_same, assert_same_value_and_gradients, batch_of, built, oracle_of, vectors_chain
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pdlightning.functional import KeyedRandom
from pdlightning.modules import ComponentModel, Components, SharedMLP

CASES = [("vectors", (3,)), ("vectors", (2, 2)), ("tokens", (3,)), ("tokens", (2, 2)), ("vectors", (2, 1, 2))]


def draws(model: ComponentModel, leading: tuple[int, ...]) -> tuple[naive.PerSite, naive.PerSite, naive.PerSite]:
    """Masks, delta masks and routes of all sites."""
    samples, now = torch.arange(leading[0], dtype=torch.int32), torch.tensor(0, dtype=torch.int32)
    random = KeyedRandom.at(seed=1, step=now, samples=samples, inner=leading[1:])
    masks = {s: random.uniform(c.C, s, "mask") for s, c in model.components.items()}
    deltas = {s: random.uniform(1, s, "delta")[..., 0] for s in masks}
    return masks, deltas, {s: random.uniform(1, s, "route")[..., 0] < 0.5 for s in masks}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("data", "leading"), CASES)
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("with_routes", [True, False])
def test_masked_forward_and_its_gradients_equal_the_oracle(
    data: str, leading: tuple[int, ...], with_delta: bool, with_routes: bool
) -> None:
    model, batch = built(data), batch_of(data, leading)
    target, ci_fn = oracle_of(model)
    masks, deltas, routes = draws(model, leading)
    ours = model.masked(
        batch, masks, delta_masks=deltas if with_delta else None, routes=routes if with_routes else None, outputs=True
    )
    theirs = naive.forward(target, batch, masks, deltas if with_delta else {}, routes if with_routes else None)
    assert list(ours.outputs) == list(theirs["outputs"])
    for site in ours.outputs:
        assert_same(ours.outputs[site], theirs["outputs"][site], site)
    assert_same_value_and_gradients(model, ours.output.sin().sum(), theirs["output"].sin().sum(), target, ci_fn)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("data", "leading"), CASES)
def test_the_clean_forward_is_the_target_and_writes_down_what_enters_and_leaves_the_sites(
    data: str, leading: tuple[int, ...]
) -> None:
    model, batch = built(data), batch_of(data, leading)
    ours, theirs = model.clean(batch, outputs=True), naive.clean_forward(oracle_of(model)[0], batch)
    assert torch.equal(ours.output, model.target(batch))
    assert_same(ours.output, theirs["output"])
    for site in model.components:
        assert_same(ours.inputs[site], theirs["inputs"][site], site)
        assert_same(ours.outputs[site], theirs["outputs"][site], site)
    assert not ours.output.requires_grad


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("data", ["vectors", "tokens"])
def test_masks_of_one_with_the_whole_delta_give_the_target_back(data: str) -> None:
    model, batch = built(data), batch_of(data, (3, 2))
    masks = {s: torch.ones(3, 2, c.C) for s, c in model.components.items()}
    out = model.masked(batch, masks, delta_masks={s: torch.ones(3, 2) for s in masks}).output
    assert_same(out, model.target(batch))


@pytest.mark.usefixtures("float64")
def test_weights_and_deltas_of_every_kind_come_in_the_layout_of_a_linear_layer() -> None:
    model = built("tokens")
    target, _ = oracle_of(model)
    for site, c in model.components.items():
        assert (c.V.shape, c.U.shape) == ((c.d_in, c.C), (c.C, c.d_out))
        assert_same(c.weight_delta, naive.weight_delta(target["sites"][site]))
        assert_same(c.weight + c.weight_delta, target["sites"][site]["W"])


def test_subcomponents_start_with_the_standard_deviations_of_the_contract() -> None:
    """V ~ N(0, 1/sqrt(d_in)), U ~ N(0, 1/sqrt(C)); d_in of an embedding is the vocabulary (spec C3)."""
    for kind, module, d_in in (("linear", nn.Linear(64, 200), 64), ("embedding", nn.Embedding(64, 200), 64)):
        c = Components(path="x", kind=kind, module=module, C=400, seed=0)  # type: ignore[arg-type]
        for tensor, std in ((c.V, d_in**-0.5), (c.U, 400**-0.5)):
            z = tensor.detach() / std
            assert abs(float(z.mean())) < 4 / math.sqrt(z.numel())
            assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / z.numel())


def test_initial_weights_depend_on_the_seed_and_the_path_alone() -> None:
    def start(sites: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
        target = vectors_chain()
        state = torch.get_rng_state()
        model = ComponentModel(target=target, sites=sites, ci_fn=SharedMLP(hidden=[2]), seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
        return {s: c.V.detach() for s, c in model.components.items()}

    both, alone, other = start({"first": 3, "second": 3}), start({"second": 3}), start({"second": 3}, seed=1)
    assert torch.equal(both["second"], alone["second"])
    assert not torch.equal(alone["second"], other["second"])


class Products(TorchDispatchMode):
    """Counts matrix products by the shape of their right-hand matrix, as stored or transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "matmul", "linear"):
            self.counts[tuple(sorted(args[2 if name == "addmm" else 1].shape[-2:]))] += 1
        return func(*args, **(kwargs or {}))


V1, U1, W1, V2, U2, W2 = (4, 7), (6, 7), (4, 6), (6, 8), (5, 8), (5, 6)
"""The shapes of V, U and W of two sites 4 -> 6 -> 5 with C 7 and 8: all different."""


@pytest.mark.parametrize(
    ("masked", "delta", "route", "expected"),
    [
        ("ab", False, False, [V1, U1, V2, U2]),
        ("ab", True, False, [V1, U1, W1, V2, U2, W2]),
        ("ab", False, True, [V1, U1, W1, V2, U2, W2]),
        ("ab", True, True, [V1, U1, W1, V2, U2, W2]),
        ("a", False, False, [V1, U1, W2]),
        ("b", True, False, [W1, V2, U2, W2]),
        ("", False, False, [W1, W2]),
    ],
)
@pytest.mark.parametrize("leading", [(3,), (2, 3)])
def test_a_masked_forward_computes_only_the_products_whose_result_is_read(
    masked: str, delta: bool, route: bool, expected: list[tuple[int, int]], leading: tuple[int, ...]
) -> None:
    target = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 5, bias=False)}).requires_grad_(False)
    model = ComponentModel(
        target=target, sites={"a": 7, "b": 8}, ci_fn=SharedMLP(hidden=[2]), run_batch=lambda t, x: t["b"](t["a"](x))
    )
    masks = {s: torch.ones(*leading, model.components[s].C) for s in masked}
    x, deltas = torch.randn(*leading, 4), {s: torch.ones(leading) for s in masked}
    routes = {s: torch.ones(leading).bool() for s in masked}
    with Products() as products:
        model.masked(x, masks, delta_masks=deltas if delta else None, routes=routes if route else None)
    assert products.counts == Counter(expected)


@pytest.mark.parametrize("data", ["vectors", "tokens"])
@pytest.mark.parametrize("sites", [slice(None), slice(1, None), slice(1)], ids=["all", "later", "first"])
def test_products_kept_from_the_clean_run_change_neither_value_nor_gradient(data: str, sites: slice) -> None:
    model, batch = built(data).double(), batch_of(data, (3, 2))
    batch = batch.double() if batch.is_floating_point() else batch
    masks, deltas, routes = ({s: x for s, x in list(d.items())[sites]} for d in draws(model, (3, 2)))
    plain = model.masked(batch, masks, delta_masks=deltas, routes=routes).output
    clean = model.clean(batch)
    with torch.no_grad():  # a term that is measured and not trained may ask first
        model.masked(batch, masks, delta_masks=deltas, routes=routes, clean=clean)
    for _ in range(2):
        kept = model.masked(batch, masks, delta_masks=deltas, routes=routes, clean=clean).output
        assert_same(kept, plain)
        parameters = list(model.components.parameters())
        found, expected = (
            torch.autograd.grad(y.sin().sum(), parameters, allow_unused=True, materialize_grads=True, retain_graph=True)
            for y in (kept, plain)
        )
        for g, h in zip(found, expected, strict=True):
            assert_same(g, h)


def test_products_of_the_clean_inputs_are_not_computed_again() -> None:
    model, x = built().float(), batch_of("vectors", (2,)).float()
    masks, deltas, _ = draws(model, (2,))
    with Products() as products:
        clean = model.clean(x)
        for _ in range(3):
            model.masked(x, masks, delta_masks={s: d.float() for s, d in deltas.items()}, clean=clean)
    with Products() as without:
        model.clean(x)
        for _ in range(3):
            model.masked(x, masks, delta_masks={s: d.float() for s, d in deltas.items()})
    saved = without.counts - products.counts
    assert saved == Counter({(3, 3): 2, (2, 3): 2}), "x V and x W^T of the first site, in all forwards but one"


def test_an_embedding_site_reads_rows_and_multiplies_by_u_alone() -> None:
    model, batch = built("tokens").float(), batch_of("tokens", (4,))
    with Products() as products:
        model.masked(batch, {"embed": torch.ones(4, 2)})
    assert products.counts == Counter([(2, 2), (2, 3), (2, 3)]), "U of the embedding, and the two frozen weights"


def test_biases_are_neither_trained_nor_masked() -> None:
    model = built("vectors").float()
    names = [name for name, _ in model.named_parameters()]
    assert not [n for n in names if "bias" in n and not n.startswith("ci_fn")]
    masks = {s: torch.zeros(2, c.C) for s, c in model.components.items()}
    out = model.masked(batch_of("vectors", (2,)).float(), masks).output
    assert torch.equal(out, model.components["second"].target_bias.expand(2, 3))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"masks": {"third": torch.ones(2, 3)}}, r"\['third'\].*\['first', 'second'\]"),
        ({"masks": {"first": torch.ones(2, 3)}, "routes": {}}, r"routes must name the sites of masks, \['first'\]"),
        ({"masks": {"first": torch.ones(2, 3)}, "delta_masks": {"second": 1}}, r"delta_masks.*\['second'\]"),
    ],
)
def test_masks_of_unknown_sites_and_unequal_names_are_refused(arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        built("vectors").masked(batch_of("vectors", (2,)), **arguments)
