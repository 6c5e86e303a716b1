"""All samples that are zero share one evaluation of the ci function: nothing may come of it but speed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pdlightning import ParameterDecomposition
from pdlightning.masking import AllSites, EachSite, Uniform
from pdlightning.metrics import HiddenMSE, ImportanceMinimalityLoss, OutputMSE, ReconstructionLoss
from pdlightning.modules import ScalarMLP, SharedMLP
from pdlightning.modules.batches import empty_last

pytestmark = pytest.mark.usefixtures("float64")


def decomposition(ci_fn: ScalarMLP | SharedMLP, *, compile: bool = False) -> ParameterDecomposition:
    torch.manual_seed(0)
    # The biases make the inputs of the second site differ from 0.
    target = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 5)).requires_grad_(False)
    return ParameterDecomposition(
        target=target,
        sites={"0": 7, "2": 6},
        ci_fn=ci_fn,
        losses={
            "recon": ReconstructionLoss(coeff=1.0, source=Uniform(), routing=AllSites(), comparison=OutputMSE()),
            "hidden": ReconstructionLoss(coeff=0.3, source=Uniform(), routing=EachSite(), comparison=HiddenMSE()),
            "importance": ImportanceMinimalityLoss(coeff=1e-2, p=0.8, beta=0.5),
        },
        compile=compile,
    )


def gradients(pd: ParameterDecomposition, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, [p for p in pd.parameters() if p.requires_grad]))


@pytest.mark.parametrize("filled", [[], [1, 4, 9], list(range(12))], ids=["none filled", "some", "all"])
@pytest.mark.parametrize("ci_fn", [ScalarMLP, SharedMLP])
def test_the_step_is_that_of_the_whole_batch(ci_fn: type[ScalarMLP | SharedMLP], filled: list[int]) -> None:
    pd, batch = decomposition(ci_fn(hidden=[4])), torch.zeros(12, 5)
    batch[filled] = torch.rand(len(filled), 5)
    short = pd.compute_step(batch, torch.tensor(3, dtype=torch.int32))
    whole = pd._compute_step(batch, torch.tensor(3, dtype=torch.int32), None, None)
    for name, (value, count) in whole.pairs.items():
        assert count == short.pairs[name][1]
        torch.testing.assert_close(short.pairs[name][0], value, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(gradients(pd, short.total), gradients(pd, whole.total), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_a_compiled_step_takes_batches_of_every_filling() -> None:
    torch._dynamo.reset()
    eager, compiled = decomposition(SharedMLP(hidden=[4])), decomposition(SharedMLP(hidden=[4]), compile=True)
    compiled.compiled_step = torch.compile(compiled._compute_step, backend="aot_eager")
    step = torch.tensor(3, dtype=torch.int32)
    for filled in (12, 4, 0, 11, 1, 6):
        batch = torch.zeros(12, 5)
        batch[:filled] = torch.rand(filled, 5)
        torch.testing.assert_close(compiled.compute_step(batch, step).total, eager.compute_step(batch, step).total)


def test_only_as_many_samples_as_differ_meet_the_ci_function() -> None:
    pd, batch, seen = decomposition(SharedMLP(hidden=[4])), torch.zeros(12, 5), []
    batch[[1, 4, 9]] = 1.0
    pd.model.ci_fn.register_forward_pre_hook(lambda _, args: seen.append(len(args[0]["0"])))
    pd.compute_step(batch, torch.tensor(0, dtype=torch.int32))
    assert seen == [4]


class Pairs(nn.Module):
    """Makes a row of its own of every two features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(-1, 2))


def test_a_target_may_make_other_rows_of_the_samples() -> None:
    recon = ReconstructionLoss(coeff=1.0, source=Uniform(), routing=AllSites(), comparison=OutputMSE())
    pd = ParameterDecomposition(
        target=Pairs().requires_grad_(False), sites={"linear": 4}, ci_fn=SharedMLP(hidden=[3]), losses={"recon": recon}
    )
    batch = torch.zeros(3, 4)
    batch[2, 1] = 1.0
    step = torch.tensor(0, dtype=torch.int32)
    short, whole = pd.compute_step(batch, step), pd._compute_step(batch[[2, 0, 1]], step, None, None)
    assert short.ci_lower["linear"].shape == (6, 4) and short.total == whole.total > 0


def test_order_and_count() -> None:
    found = empty_last(torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0], [float("nan"), 0.0]]))
    assert found is not None and found[0].tolist() == [1, 3, 0, 2] and found[1] == 3
    assert empty_last(torch.tensor([[0.0, 0.0], [0.0, 2.0]])) is None, "a single empty sample shares with no other"
    assert empty_last(torch.zeros(2, 3, dtype=torch.long)) is None
    assert empty_last(torch.zeros(2, 3, 4)) is None
    assert empty_last((torch.zeros(2, 3),)) is None
