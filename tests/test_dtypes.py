"""A target in bfloat16, cast once: V, U and the ci function stay in float32, with autocast and without."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from pdlightning import ParameterDecomposition
from pdlightning.build import cast_weights
from pdlightning.masking import AllSites, Uniform
from pdlightning.metrics import FaithfulnessLoss, HiddenMSE, OutputMSE, ReconstructionLoss
from pdlightning.modules import SharedMLP
from pdlightning.targets.language import LlamaSimpleMLP

BFLOAT = torch.bfloat16


def small_target() -> LlamaSimpleMLP:
    torch.manual_seed(0)
    return LlamaSimpleMLP(vocab_size=30, n_ctx=16, n_layers=1, n_heads=2, d_model=16, d_mlp=32, seed=0)


def decomposition(target: torch.nn.Module) -> ParameterDecomposition:
    def recon(comparison: OutputMSE | HiddenMSE) -> ReconstructionLoss:
        return ReconstructionLoss(coeff=1.0, source=Uniform(), routing=AllSites(), comparison=comparison)

    return ParameterDecomposition(
        target=target.requires_grad_(False),
        sites={"*proj": 24, "*c_fc": 24},
        ci_fn=SharedMLP(hidden=[8]),
        losses={
            "faithfulness": FaithfulnessLoss(coeff=1.0),
            "recon": recon(OutputMSE()),
            "hidden": recon(HiddenMSE()),
        },
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_everything_that_is_trained_is_float32_and_near_the_float32_step(autocast: bool) -> None:
    tokens, step = torch.arange(24).reshape(2, 12) % 30, torch.tensor(0, dtype=torch.int32)
    short = small_target()
    cast_weights(short, "bfloat16")
    assert {p.dtype for p in short.parameters()} == {BFLOAT}
    ours, whole = decomposition(short), decomposition(small_target())
    with torch.autocast("cpu", dtype=BFLOAT) if autocast else nullcontext():
        total = ours.compute_step(tokens, step).total
    total.backward()
    expected = whole.compute_step(tokens, step).total
    expected.backward()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=0.03, atol=0)
    found, exact = ({name: p.grad for name, p in pd.components.named_parameters()} for pd in (ours, whole))
    for name, gradient in found.items():
        assert gradient is not None and gradient.dtype == torch.float32, name
        similar = torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0)
        assert similar > 0.99, (name, similar)


def test_whole_masks_and_delta_give_the_output_of_the_bfloat16_target() -> None:
    target, tokens = small_target(), torch.arange(24).reshape(2, 12) % 30
    cast_weights(target, "bfloat16")
    expected = target.requires_grad_(False)(tokens)
    pd = decomposition(target)
    ones = {s: torch.ones(2, 12, 24) for s in pd.components}
    output = pd.masked_forward(tokens, ones, delta_masks={s: torch.ones(2, 12) for s in ones})
    assert output.dtype == expected.dtype == BFLOAT
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)


def test_buffers_are_not_cast() -> None:
    module = torch.nn.BatchNorm1d(3)
    cast_weights(module, "bfloat16")
    assert module.weight.dtype == BFLOAT and module.running_mean is not None
    assert module.running_mean.dtype == torch.float32


def test_no_dtype_casts_nothing() -> None:
    target = small_target()
    cast_weights(target, None)
    assert {p.dtype for p in target.parameters()} == {torch.float32}
