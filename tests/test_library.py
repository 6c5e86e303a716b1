"""ParameterDecomposition as a library: somebody else's model, loader and Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pdlightning import ParameterDecomposition
from pdlightning import functional as pf
from pdlightning.guards import NonFiniteError
from pdlightning.masking import AllSites, Uniform, UniformSubset
from pdlightning.metrics import (
    FaithfulnessLoss,
    ImportanceMinimalityLoss,
    Loss,
    OutputKL,
    OutputMSE,
    ReconstructionLoss,
)
from pdlightning.modules import SharedMLP
from pdlightning.optimization import AdamW, FaithfulnessWarmup
from pdlightning.schedules import Schedule


def trainer(steps: int) -> lightning.Trainer:
    return lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


def losses(importance: float = 1e-3, recon: Loss | None = None) -> dict[str, Loss]:
    return {
        "faithfulness": FaithfulnessLoss(coeff=1.0),
        "importance_minimality": ImportanceMinimalityLoss(coeff=importance, p=1.0),
        "stochastic_recon": recon
        or ReconstructionLoss(coeff=1.0, source=Uniform(), routing=AllSites(), comparison=OutputMSE()),
    }


class Net(nn.Module):
    """Somebody's model: a tensor in, the result in any wrapping."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda y: y):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
        self.wrap = wrap

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        y = self.layers(x)
        return self.wrap(y if scale is None else y * scale)


def decomposed(target: nn.Module | None = None, **arguments: Any) -> ParameterDecomposition:
    given = {"sites": {"layers.[02]": 6}, "ci_fn": SharedMLP(hidden=[8]), "losses": losses(), **arguments}
    return ParameterDecomposition(target=(target or Net()).requires_grad_(False), **given)


def weights(pd: ParameterDecomposition) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in pd.named_parameters()}


def x(n: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def test_ten_lines_decompose_a_model() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    loader = DataLoader(x(64), batch_size=16)  # type: ignore[arg-type]

    pd = ParameterDecomposition(
        target=model.requires_grad_(False),
        sites={"[02]": 20},
        ci_fn=SharedMLP(hidden=[32]),
        losses={
            "faithfulness": FaithfulnessLoss(coeff=1.0),
            "importance_minimality": ImportanceMinimalityLoss(coeff=1e-3, p=1.0),
            "stochastic_recon": ReconstructionLoss(
                coeff=1.0, source=Uniform(), routing=AllSites(), comparison=OutputMSE()
            ),
        },
    )
    before = weights(pd)
    lightning.Trainer(max_steps=6, logger=False, enable_checkpointing=False, enable_progress_bar=False).fit(pd, loader)

    ci, batch = pd.causal_importances(x()), x()
    assert {site: tuple(lower.shape) for site, lower in ci.lower.items()} == {"0": (16, 20), "2": (16, 20)}
    out = pd.masked_forward(batch, masks={site: torch.ones(16, 20) for site in pd.components})
    first, second = pd.components["0"], pd.components["2"]
    hidden = torch.relu(batch @ first.weight.T + model[0].bias)
    torch.testing.assert_close(out, hidden @ second.weight.T + model[2].bias)
    assert all(not torch.equal(before[name], p) for name, p in weights(pd).items()), "every parameter has moved"


RESULTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, "cache"),
    "logits": lambda y: SimpleNamespace(logits=y, loss=None),
}
BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, torch.zeros(len(x))),
    "dict": lambda x: {"x": x, "scale": torch.full((len(x), 1), 1.0)},
}


@pytest.mark.parametrize("result", list(RESULTS))
@pytest.mark.parametrize("batch", list(BATCHES))
def test_batches_and_results_come_in_the_usual_wrappings(batch: str, result: str) -> None:
    torch.manual_seed(0)
    pd, plain = decomposed(Net(RESULTS[result])), Net()
    plain.load_state_dict(pd.model.restore().state_dict())
    pd, twin = decomposed(pd.target), decomposed(plain)  # type: ignore[arg-type]
    data = [BATCHES[batch](part) for part in x().split(8)]
    trainer(2).fit(pd, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    trainer(2).fit(twin, DataLoader(list(x().split(8)), batch_size=None))  # type: ignore[arg-type]
    for name, value in weights(twin).items():
        torch.testing.assert_close(weights(pd)[name], value, msg=name)


def test_any_other_batch_and_result_take_two_functions() -> None:
    pd = decomposed(
        Net(lambda y: {"answer": [y]}),
        run_batch=lambda target, batch: target(batch.inputs),
        output=lambda result: result["answer"][0],
    )
    ci = pd.causal_importances(SimpleNamespace(inputs=x(3)))
    assert ci.lower["layers.0"].shape == (3, 6)


def test_a_batch_or_result_of_unknown_type_is_answered_with_the_argument_to_pass() -> None:
    with pytest.raises(TypeError, match=r"batch of type SimpleNamespace.*run_batch="):
        decomposed().causal_importances(SimpleNamespace(inputs=x()))
    with pytest.raises(TypeError, match=r"which tensor of a dict.*output="):
        decomposed(Net(lambda y: {"answer": y})).causal_importances(x())


def test_a_single_sample_without_a_leading_axis_is_named() -> None:
    with pytest.raises(ValueError, match="leading axis of samples.*Does the loader give batches"):
        trainer(1).fit(decomposed(), DataLoader(list(x(2)), batch_size=None))  # type: ignore[arg-type]


def test_tokens_go_through_an_embedding_site_with_two_leading_axes() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    tokens = torch.randint(7, (32, 5), generator=torch.Generator().manual_seed(0))
    recon = ReconstructionLoss(coeff=1.0, source=Uniform(), routing=UniformSubset(), comparison=OutputKL())
    pd = decomposed(model, sites={"0": 3, "1": 6}, losses=losses(recon=recon))
    before = weights(pd)
    trainer(4).fit(pd, DataLoader(tokens, batch_size=8))  # type: ignore[arg-type]
    assert pd.components["0"].V.shape == (7, 3)
    assert pd.causal_importances(tokens).lower["1"].shape == (32, 5, 6)
    assert all(not torch.equal(before[name], p) for name, p in weights(pd).items())


def test_the_target_stays_in_evaluation_mode_and_out_of_the_state() -> None:
    pd = decomposed()
    before = pd.target(x())
    trainer(3).fit(pd, DataLoader(x(), batch_size=8))  # type: ignore[arg-type]
    pd.train()
    assert not any(m.training for m in pd.target.modules() if not list(m.children()) and not hasattr(m, "V"))
    assert torch.equal(pd.target(x()), before), "dropout is off, and no weight has moved"
    assert not [name for name in pd.state_dict() if "target" in name or "module" in name]
    assert len(pd.state_dict()) == 2 * 2 + 2 * 4, "V and U, and the weights and biases, of two sites"
    assert not any(p.requires_grad for name, p in pd.model.restore().named_parameters())


def test_a_decomposition_inside_a_copy_trains_alone() -> None:
    pd = decomposed()
    before, twin = weights(pd), copy.deepcopy(pd)
    trainer(2).fit(twin, DataLoader(x(), batch_size=8))  # type: ignore[arg-type]
    assert all(torch.equal(before[name], p) for name, p in weights(pd).items())
    assert all(not torch.equal(before[name], p) for name, p in weights(twin).items())


def test_the_same_seed_gives_the_same_weights_whatever_the_global_generator() -> None:
    net = Net()

    def trained(global_seed: int, seed: int) -> dict[str, Tensor]:
        pd = decomposed(copy.deepcopy(net), seed=seed)
        torch.manual_seed(global_seed)
        trainer(3).fit(pd, DataLoader(x(), batch_size=8))  # type: ignore[arg-type]
        return weights(pd)

    first, again, other = trained(0, 0), trained(1, 0), trained(0, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.components.layers/0.V"], other["model.components.layers/0.V"])


@pytest.mark.parametrize(("parts", "there"), [(1, [False] * 4), (2, [False, True, False, True])])
def test_a_forward_finds_the_gradients_of_its_own_step_alone(parts: int, there: list[bool]) -> None:
    pd, found = decomposed(), []
    pd.model.ci_fn.register_forward_pre_hook(lambda *_: found.append(any(p.grad is not None for p in pd.parameters())))
    fitting = trainer(4 // parts)
    fitting.accumulate_grad_batches = parts
    fitting.fit(pd, DataLoader(x(64), batch_size=16))
    assert found == there, "they would take room beside the activations"
    assert any(p.grad is not None for p in pd.parameters()), "callbacks may read them when a batch has ended"


def test_a_batch_with_nan_stops_the_run_and_leaves_finite_weights() -> None:
    data = x(32)
    data[17, 2] = float("nan")
    pd = decomposed()
    said = r"at step 2\..*the batch itself.*ci of site layers\.0.*term stochastic_recon"
    with pytest.raises(NonFiniteError, match=said):
        trainer(4).fit(pd, DataLoader(data, batch_size=8))  # type: ignore[arg-type]
    assert all(bool(p.isfinite().all()) for p in pd.parameters())


def test_an_infinite_weight_is_named() -> None:
    pd = decomposed()
    pd.components["layers.2"].V.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"at step 0\..*parameter components\.layers/2\.V.*term faithfulness"):
        trainer(1).fit(pd, DataLoader(x(), batch_size=8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: decomposed(losses={}), "No losses: pass losses="),
        (lambda: decomposed(losses={"f": FaithfulnessLoss(coeff=0.0)}), "Every loss has coeff 0.*f"),
        (lambda: decomposed(sites={"layers.0": 0}), "integer >= 1, got 0"),
        (lambda: decomposed(sites={"layer.*": 2}), r"matches no module.*layers\.0, layers\.2"),
        (lambda: decomposed(squash="hart"), "'hart': expected one of leaky_hard, sigmoid"),
        (lambda: decomposed(losses={"f": FaithfulnessLoss(coeff=-1.0)}), "got -1.0"),
        (lambda: AdamW(lr=Schedule(start=1e-3, warmup_frac=1.2)), r"\[0, 1\], got 1.2"),
        (lambda: AdamW(lr=-1e-3), r"AdamW\(lr\).*-0.001"),
        (lambda: AdamW(clip=0.0), r"AdamW\(clip\).*above 0, or None, got 0.0"),
        (lambda: FaithfulnessWarmup(steps=-1), "steps must be >= 0"),
        (lambda: ParameterDecomposition(
            target=Net(), sites={"layers.0": 2}, ci_fn=SharedMLP(hidden=[2]), losses=losses()
        ), r"must be frozen.*layers\.0\.weight.*requires_grad_\(False\)"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_at_construction(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_clipping_all_groups_as_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"AdamW\(clip=...\) of each group"):
        lightning.Trainer(
            max_steps=1, gradient_clip_val=1.0, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(decomposed(), DataLoader(x(), batch_size=8))  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mechanisms_of_a_small_network_are_found(seed: int) -> None:
    """ReLU(diag(w) x) has three mechanisms, one for each sparse feature; six subcomponents are offered."""
    linear = nn.Linear(3, 3, bias=False)
    linear.weight.data = torch.diag(torch.tensor([1.0, 1.5, 0.8]))
    generator = torch.Generator().manual_seed(seed)
    values, present = torch.rand(2, 128_000, 3, generator=generator)
    optimizer = AdamW(lr=Schedule(start=2e-2, kind="cosine", final_frac=0.0))
    pd = decomposed(
        nn.Sequential(linear, nn.ReLU()), sites={"0": 6}, ci_fn=SharedMLP(hidden=[16]), losses=losses(importance=5e-3),
        components_optimizer=optimizer, ci_optimizer=optimizer, seed=seed,
        faithfulness_warmup=FaithfulnessWarmup(steps=100),
    )  # fmt: skip
    trainer(1000).fit(pd, DataLoader(values * (present < 0.25), batch_size=128))  # type: ignore[arg-type]
    ci, found = pd.causal_importances(0.75 * torch.eye(3)).lower["0"], pd.components["0"]
    assert pf.identity_ci_error(ci) == 0
    similarity = pf.mean_max_cosine_similarity(linear.weight, found.V.detach(), found.U.detach())
    length = pf.mean_l2_ratio(linear.weight, found.V.detach(), found.U.detach())
    assert similarity > 0.95 and 0.9 < length < 1.1
