"""Interventions agree with the oracle at every kind of site, compose, end, and are refused where they make no sense."""

from __future__ import annotations

import copy
import threading
from typing import Any

import lightning
import naive
import pytest
import torch
from edit_cases import SITES, drawn, edits_of
from parity import assert_same, batch_of, built, oracle_target, vectors_chain
from torch import Tensor

from pdlightning import ParameterDecomposition
from pdlightning.editing.interventions import Intervention
from pdlightning.masking import AllSites, Uniform
from pdlightning.metrics import FaithfulnessLoss, OutputMSE, ReconstructionLoss
from pdlightning.modules import ComponentModel, SharedMLP


@pytest.mark.parametrize("leading", [(4,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("name", list(edits_of("vectors")))
@pytest.mark.parametrize("data", ["vectors", "tokens"])
def test_the_oracle_computes_the_same(float64, data: str, name: str, leading: tuple[int, ...]) -> None:
    model, batch = built(data), batch_of(data, leading)
    arguments, masks, deltas = edits_of(data)[name]
    expected = naive.forward(
        oracle_target(model),
        batch,
        {s: torch.tensor(m, dtype=torch.float64).expand(*leading, -1) for s, m in masks.items()},
        {s: torch.tensor(float(m)).expand(leading) for s, m in deltas.items()},
    )
    with Intervention(model, **arguments):
        assert_same(model.target(batch), expected["output"])


@pytest.mark.parametrize("data", ["vectors", "tokens"])
def test_an_ablated_subcomponent_leaves_every_site_as_its_weight_without_it(float64, data: str) -> None:
    model, batch = built(data), batch_of(data, (2, 3))
    for path, c in model.components.items():
        target = oracle_target(model)
        target["sites"][path]["W"] = target["sites"][path]["W"] - torch.outer(c.U[1], c.V[:, 1]).detach()
        with Intervention(model, ablate={path: [1]}):
            assert_same(model.target(batch), naive.clean_forward(target, batch)["output"], path)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("data", ["vectors", "tokens"])
def test_replaced_vectors_stand_in_for_the_old_ones(float64, data: str, whole: bool) -> None:
    """The delta stays that of the old V and U."""
    model, batch = built(data), batch_of(data, (2, 3))
    for i, (path, c) in enumerate(model.components.items()):
        V, U = c.V.detach().clone(), c.U.detach().clone()
        V[:, 1], U[0] = drawn(c.d_in, seed=i), drawn(c.d_out, seed=i + 9)
        target = oracle_target(model)
        site = target["sites"][path]
        target["sites"][path] = {**site, "W": site["W"] + (V @ U - c.V @ c.U).T.detach(), "V": V, "U": U}
        mask = torch.ones(c.C).index_fill(0, torch.tensor(0), 0.5)
        given: dict[str, Any] = (
            {"V": {path: V}, "U": {path: U}} if whole else {"V": {path: {1: V[:, 1]}}, "U": {path: {0: U[0]}}}
        )
        expected = naive.forward(target, batch, {path: mask.expand(2, 3, -1)}, {path: torch.full((2, 3), 0.25)})
        with Intervention(model, **given, scale={path: {0: 0.5}}, delta=0.25):
            assert_same(model.target(batch), expected["output"], path)


@pytest.mark.parametrize("positions", [[0, -1], torch.tensor([[True, False, True], [True, False, True]])])
@pytest.mark.parametrize("data", ["vectors", "tokens"])
def test_other_positions_stay_the_targets_own(float64, data: str, positions: Any) -> None:
    model, batch, path = built(data), batch_of(data, (2, 3)), list(SITES[data])[0]
    with Intervention(model, keep={path: [0]}):
        edited = model.target(batch)
    with Intervention(model, keep={path: [0]}, positions=positions):
        some = model.target(batch)
    assert_same(some[:, [0, 2]], edited[:, [0, 2]])
    assert_same(some[:, 1], model.target(batch)[:, 1])
    assert not torch.allclose(some[:, 0], model.target(batch)[:, 0])


def test_masks_of_every_position_are_those_of_the_masked_forward(float64) -> None:
    model, batch = built("tokens"), batch_of("tokens", (2, 3))
    ci = model.causal_importances(model.clean(batch)).lower
    with Intervention(model, masks=ci):
        assert_same(model.target(batch), model_masked(model, batch, ci))
    factor = torch.tensor([[1.0, 0.0, 2.0]])  # one row of positions for the whole batch
    with Intervention(model, scale={"out": {1: factor}}, masks=ci):
        scaled = model.target(batch)
    ci["out"] = torch.stack([ci["out"][..., 0], ci["out"][..., 1] * factor], dim=-1)
    assert_same(scaled, model_masked(model, batch, ci))


def model_masked(model: ComponentModel, batch: Tensor, masks: dict[str, Tensor]) -> Tensor:
    return copy.deepcopy(model).masked(batch, masks).output  # a copy has no intervention in it


def test_interventions_in_one_another_compose(float64) -> None:
    model, batch = built(), batch_of("vectors", (2, 3))

    def edited(*layers: dict[str, Any]) -> Tensor:
        if not layers:
            return model.target(batch)
        with Intervention(model, **layers[0]):
            return edited(*layers[1:])

    def at(path: str, edit: str, value: Any) -> dict[str, Any]:
        return {edit: {path: value}}

    first, second = "first", "second"
    both = {"ablate": {first: [0, 1], second: [1]}}
    assert_same(edited(at(first, "ablate", [0]), {"ablate": {first: [1], second: [1]}}), edited(both))
    assert_same(edited(at(first, "keep", [0, 1]), at(first, "keep", [1, 2])), edited(at(first, "keep", [1])))
    assert_same(edited(at(first, "scale", {0: 2}), at(first, "add", {0: 1})), edited(at(first, "scale", {0: 3})))
    assert_same(edited(at(first, "add", {0: 1}), at(first, "scale", {0: 2})), edited(at(first, "scale", {0: 4})))
    U = drawn(2)
    assert_same(
        edited(at(first, "U", {0: U}), at(first, "scale", {0: 2})),
        edited(at(first, "U", {0: U}), at(first, "add", {0: 1})),
    )
    here = edited(at(first, "ablate", [0]) | {"positions": [0]}, at(first, "scale", {0: 5}) | {"positions": [1]})
    assert_same(here[:, 0], edited(at(first, "ablate", [0]))[:, 0])
    assert_same(here[:, 1], edited(at(first, "scale", {0: 5}))[:, 1])
    assert_same(here[:, 2], edited()[:, 2])


def test_the_target_is_as_it_was_afterwards_and_after_an_exception() -> None:
    model, batch = built(), batch_of("vectors", (4,))
    before, ablation = model.target(batch), Intervention(model, ablate={"first": [0]})
    for _ in range(2):
        with ablation:
            assert not torch.allclose(model.target(batch), before)
        assert torch.equal(model.target(batch), before)
    with pytest.raises(ZeroDivisionError), ablation, Intervention(model, delta=False):
        _ = 1 / 0
    assert model.current.edited is None
    assert torch.equal(model.target(batch), before)


def test_gradients_flow_to_the_values_which_every_call_reads_anew(float64) -> None:
    """d output / d mask is the attribution of a subcomponent; the reference is the oracle's autograd."""
    model, batch = built(), batch_of("vectors", (4,))
    masks, delta = torch.ones(3, requires_grad=True), torch.ones((), requires_grad=True)
    reference = naive.forward(oracle_target(model), batch, {"first": masks.expand(4, -1)}, {"first": delta.expand(4)})
    expected = torch.autograd.grad(reference["output"][:, 1].sum(), [masks, delta])
    scale, one, whole = (
        torch.ones(3, requires_grad=True),
        torch.ones((), requires_grad=True),
        torch.ones((), requires_grad=True),
    )
    with Intervention(model, scale={"first": scale}, delta={"first": whole}):
        found = torch.autograd.grad(model.target(batch)[:, 1].sum(), [scale, whole])
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)
    with Intervention(model, scale={"first": {2: one}}):
        for _ in range(2):
            assert_same(torch.autograd.grad(model.target(batch)[:, 1].sum(), one)[0], expected[0][2])
        kept = model.target(batch)
        one.data.mul_(2)
        assert not torch.allclose(model.target(batch), kept)


def decomposed() -> ParameterDecomposition:
    recon = ReconstructionLoss(coeff=1.0, source=Uniform(), routing=AllSites(), comparison=OutputMSE())
    return ParameterDecomposition(
        target=vectors_chain(),
        sites={"*t": 3, "*d": 2},
        ci_fn=SharedMLP(hidden=[3]),
        losses={"faithfulness": FaithfulnessLoss(coeff=1.0), "recon": recon},
    )


@torch.no_grad()
def test_what_a_decomposition_tells_inside_is_of_the_edited_network() -> None:
    pd, x = decomposed(), batch_of("vectors", (2, 3))
    assert torch.equal(pd(x), pd.target(x))
    activations = pd.component_activations(x)
    assert {s: tuple(a.shape) for s, a in activations.items()} == {"first": (2, 3, 3), "second": (2, 3, 2)}
    torch.testing.assert_close(activations["first"], x @ pd.components["first"].V)
    before = pd.causal_importances(x).logits
    with pd.masked(keep={"first": []}):
        assert torch.equal(pd.component_activations(x)["first"], activations["first"])
        assert not pd.component_activations(x)["second"].any(), "nothing comes out of the first layer"
        assert torch.equal(pd.causal_importances(x).logits["first"], before["first"])
        assert not torch.allclose(pd.causal_importances(x).logits["second"], before["second"])
        assert torch.equal(copy.deepcopy(pd)(x), vectors_chain()(x)), "nobody would end it in a copy"


def test_neither_a_masked_forward_nor_training_mixes_with_an_intervention() -> None:
    pd, x = decomposed(), batch_of("vectors", (2, 3))
    with pd.masked(), pytest.raises(RuntimeError, match=r"masked forward in it.*masked\(masks="):
        pd.masked_forward(x, {"first": torch.ones(2, 3, 3)})
    trainer = lightning.Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pd.masked(), pytest.raises(RuntimeError, match="An intervention is open"):
        trainer.fit(pd, torch.utils.data.DataLoader(drawn(4, 3).unbind(), batch_size=2))


def test_one_thread_opens_and_every_thread_is_served() -> None:
    pd, x = decomposed(), batch_of("vectors", (4,))
    seen: list[Any] = []

    def elsewhere() -> None:
        seen.append(pd(x))
        with pytest.raises(RuntimeError, match="Another thread has an intervention open"), pd.masked():
            pass

    with pd.masked(ablate={"first": [0]}):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert torch.equal(seen[0], pd(x))
    once = pd.masked()
    with once, pytest.raises(RuntimeError, match="open already"), once:
        pass


def test_the_output_has_the_type_of_the_target() -> None:
    model = ComponentModel(target=vectors_chain().bfloat16(), sites={"*t": 3}, ci_fn=SharedMLP(hidden=[3]))
    x = batch_of("vectors", (4,)).bfloat16()
    with Intervention(model, ablate={"first": [0]}, U={"first": {1: torch.ones(2)}}, positions=[0]):
        assert model.target(x).dtype == torch.bfloat16
    with Intervention(model, ablate={"first": []}):
        torch.testing.assert_close(model.target(x), vectors_chain().bfloat16()(x))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"ablate": {"third": [0]}}, KeyError, "No site 'third'.*first, second"),
        ({"ablate": ["first"]}, TypeError, r"ablate: expected \{site"),
        ({"ablate": {"first": [3, 5]}}, IndexError, r"ablate\['first'\]: no subcomponent 3, 5; the site has 3, 0 to 2"),
        ({"keep": {"first": [-1]}}, IndexError, "no subcomponent -1"),
        ({"keep": {"first": 0}}, TypeError, r"keep\['first'\]: expected indices.*got 0"),
        ({"keep": {"first": [0.5]}}, TypeError, "expected indices"),
        ({"keep": {"first": "all"}}, TypeError, "expected indices.*'all'"),
        ({"keep": {"first": torch.tensor([True, False])}}, ValueError, r"boolean tensor \[C\] with C = 3, got.*\[2\]"),
        ({"scale": {"first": {7: 1.0}}}, IndexError, "no subcomponent 7"),
        ({"scale": {"first": [2.0]}}, TypeError, r"scale\['first'\]: expected \{index"),
        ({"scale": {"first": {0: "2"}}}, TypeError, "got '2' for 0"),
        ({"add": {"first": torch.ones(2)}}, ValueError, r"C = 3, got the shape \[2\]"),
        ({"masks": {"first": torch.ones(2)}}, ValueError, r"masks\['first'\]: expected a tensor \[3\]"),
        ({"masks": {"first": 1.0}}, ValueError, "expected a tensor"),
        ({"V": {"first": {0: torch.ones(2)}}}, ValueError, r"V\['first'.*\{index: tensor \[3\].*\[2\] for 0"),
        ({"U": {"first": torch.ones(2, 3)}}, ValueError, r"or a tensor \[3, 2\], got the shape \[2, 3\]"),
        ({"U": {"first": {0: 1.0}}}, TypeError, "got 1.0 for 0"),
        ({"delta": "no"}, TypeError, "delta of site 'first': expected True, False"),
        ({"positions": 3}, TypeError, "positions: expected a boolean tensor.*got 3"),
        ({"positions": [0.5]}, TypeError, "positions: expected"),
        ({"keep": {"first": [0]}, "ablate": {"first": [0]}}, ValueError, r"keep and ablate both name \[0\]"),
        ({"scale": {"first": {1: 2.0}}, "ablate": {"first": [1]}}, ValueError, r"scale and ablate both name \[1\]"),
        ({"scale": {"first": {1: 2.0}}, "keep": {"first": [0]}}, ValueError, r"scale names \[1\], which keep"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_at_once(arguments: dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        Intervention(built(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (
            {"positions": torch.ones(3, dtype=torch.bool)},
            ValueError,
            r"positions has the shape \[3\].*runs on \[2, 3\]",
        ),
        ({"positions": torch.ones(2, 2, dtype=torch.bool)}, ValueError, r"shape \[2, 2\], but site 'first'"),
        ({"positions": [0, 3]}, IndexError, r"positions \[3\] are not among the 3.*one call"),
        ({"scale": {"first": torch.ones(3, 3)}}, ValueError, r"scale of site 'first' is for positions \[3\]"),
        ({"scale": {"first": {0: torch.ones(2)}}}, ValueError, r"for positions \[2\], but the site runs on \[2, 3\]"),
        ({"delta": torch.ones(5)}, ValueError, r"delta of site 'first' is for positions \[5\]"),
        ({"masks": {"first": torch.ones(2, 4, 3)}}, ValueError, r"masks of site 'first' is for positions \[2, 4\]"),
    ],
)
def test_what_does_not_fit_the_batch_is_said_by_the_call(arguments: dict[str, Any], error: type, said: str) -> None:
    model = built()
    with Intervention(model, **{"ablate": {"first": []}, **arguments}), pytest.raises(error, match=said):
        model.target(batch_of("vectors", (2, 3)))
