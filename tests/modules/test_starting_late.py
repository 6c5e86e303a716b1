"""A forward with masks in late sites alone starts where the first of them is, and nobody can tell by its result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pdlightning.functional import KeyedRandom
from pdlightning.modules import ComponentModel, SharedMLP
from pdlightning.modules.site import Block, Site
from pdlightning.targets import ResidMLP
from pdlightning.targets.language import LlamaSimple


def llama() -> nn.Module:
    return LlamaSimple(vocab_size=11, n_ctx=6, d_model=8, n_layers=3, n_heads=2, d_mlp=12, seed=0)


def resid_mlp() -> nn.Module:
    return ResidMLP(
        n_features=5, d_embed=8, d_mlp=3, n_layers=3, embedding="fixed_random", activation="relu", in_bias=True,
        out_bias=False, seed=0,
    )  # fmt: skip


def huggingface() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **sizes, num_key_value_heads=2)).eval()


TOKENS = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[Any, dict[str, int], Tensor]] = {
    "llama": (llama, {"wte": 3, "h.*.attn.*_proj": 4, "h.*.mlp.*_proj": 5}, TOKENS),
    "resid_mlp": (resid_mlp, {"layers.*.mlp_*": 4, "layers.1.pre_identity": 3}, torch.ones(2, 5)),
    "huggingface": (huggingface, {"model.layers.*.q_proj": 4, "model.layers.*.down_proj": 3}, TOKENS),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[ComponentModel, Tensor]:
    make, sites, batch = CASES[request.param]
    target = make().double().requires_grad_(False)
    model = ComponentModel(target=target, sites=sites, ci_fn=SharedMLP(hidden=[2]))
    return model, batch.double() if batch.is_floating_point() else batch


def masks_of(model: ComponentModel, batch: Tensor, sites: list[str]) -> dict[str, dict[str, Tensor]]:
    samples, step = torch.arange(len(batch), dtype=torch.int32), torch.tensor(0, dtype=torch.int32)
    inner = () if batch.is_floating_point() else tuple(batch.shape[1:])
    random = KeyedRandom.at(seed=1, step=step, samples=samples, inner=inner)
    masks = {s: random.uniform(model.components[s].C, s, "mask").double() for s in sites}
    return {"masks": masks, "delta_masks": {s: random.uniform(1, s, "delta")[..., 0].double() for s in sites}}


def test_value_gradient_and_site_outputs_are_those_of_the_whole_forward(case: tuple[ComponentModel, Tensor]) -> None:
    model, batch = case
    sites = list(model.components)
    for some in [[site] for site in sites] + [sites[len(sites) // 2 :], sites]:
        clean, given = model.clean(batch, outputs=True), masks_of(model, batch, some)
        whole = model.masked(batch, **given, outputs=True)
        late = model.masked(batch, **given, outputs=True, clean=clean)
        torch.testing.assert_close(late.output, whole.output, rtol=1e-12, atol=1e-12)
        assert late.outputs.keys() == whole.outputs.keys()
        for site in sites:
            torch.testing.assert_close(late.outputs[site], whole.outputs[site], rtol=1e-12, atol=1e-12)
        parameters = [p for site in some for p in model.components[site].parameters()]
        found, expected = (torch.autograd.grad(run.output.sin().sum(), parameters) for run in (late, whole))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_blocks_and_sites_before_the_first_mask_do_not_run(case: tuple[ComponentModel, Tensor]) -> None:
    model, batch = case
    clean, ran = model.clean(batch, outputs=True), []
    blocks = [path for path, module in model.target.named_modules() if isinstance(module, Block)]
    assert len(blocks) == 3
    for path, module in model.target.named_modules():
        if isinstance(module, Block | Site):
            module.module.register_forward_hook(lambda *_, path=path: ran.append(path))
    first, *_, last = [site for site, c in model.components.items() if c.kind == "linear"]
    model.masked(batch, **masks_of(model, batch, [last]), clean=clean)
    assert ran == blocks[-1:], "nor do the earlier sites of its block"
    ran.clear()
    model.masked(batch, **masks_of(model, batch, [first]), clean=clean)
    assert [path for path in ran if path in blocks] == blocks


def test_a_clean_run_without_outputs_leaves_nothing_to_start_from(case: tuple[ComponentModel, Tensor]) -> None:
    model, batch = case
    clean = model.clean(batch)
    assert not clean.blocks and not clean.outputs
    given = masks_of(model, batch, list(model.components)[-1:])
    torch.testing.assert_close(model.masked(batch, **given, clean=clean).output, model.masked(batch, **given).output)


@pytest.mark.parametrize("name", CASES)
def test_the_target_comes_back_without_the_stand_ins_of_its_blocks(name: str) -> None:
    make, sites, _ = CASES[name]
    target = make().requires_grad_(False)
    modules, keys = dict(target.named_modules()), list(target.state_dict())
    model = ComponentModel(target=target, sites=sites, ci_fn=SharedMLP(hidden=[2]))
    assert any("module" in path.split(".") for path, _ in target.named_modules())
    assert dict(model.restore().named_modules()) == modules
    assert list(target.state_dict()) == keys
