"""The ci functions for sequences twice: the package's modules, and the oracle's dictionaries of the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive
import torch
from parity import SEED, TOKEN_SITES, VECTOR_SITES, oracle_target, seeded, tokens_chain, vectors_chain
from torch import Tensor, nn

from pdlightning.modules import (
    AttentionSettings,
    ChunkwiseTransformer,
    CIFunction,
    CIShape,
    ComponentModel,
    GlobalTransformer,
    ReverseResidual,
)
from pdlightning.modules.global_transformer import SiteTransformer
from pdlightning.modules.mlp_ci import MLP
from pdlightning.modules.reverse_residual import Stage
from pdlightning.modules.sequence_blocks import Block

Recipe = Callable[[], CIFunction]
Get = Callable[[nn.Parameter], Tensor]


def small(**changes: Any) -> dict[str, Any]:
    """Settings of a small transformer."""
    return {"d_model": 8, "n_blocks": 2, "n_heads": 2, "mlp_hidden": [5], **changes}


CAUSAL = AttentionSettings(n_heads=1, direction="causal", rope_base=30.0)
ANY_SITES: dict[str, Recipe] = {
    "global": lambda: GlobalTransformer(**small()),
    "global causal": lambda: GlobalTransformer(**small(mlp_hidden=[5, 3]), attention="causal", rope_base=30.0),
    "chunkwise": lambda: ChunkwiseTransformer(groups=2, **small()),
    "reverse": lambda: ReverseResidual(groups=2, d_model=3),
    "reverse attention": lambda: ReverseResidual(groups=2, d_model=8, attention=AttentionSettings(n_heads=2)),
    "reverse transition": lambda: ReverseResidual(groups=2, d_model=3, transition_hidden=[4]),
    "reverse both": lambda: ReverseResidual(groups=2, d_model=4, attention=CAUSAL, transition_hidden=[4, 2]),
}
GROUPS = {"late": ["out"], "early": ["emb*", "conv.*"], "middle": ["conv"]}
TOKEN_SITES_ONLY: dict[str, Recipe] = {
    "chunkwise taps": lambda: ChunkwiseTransformer(
        groups=GROUPS, taps={"late": ["conv*", "out"], "middle": ["embed"]}, **small(n_blocks=1)
    ),
    "reverse three": lambda: ReverseResidual(groups=GROUPS, d_model=4, attention=CAUSAL, transition_hidden=[3]),
}
RECIPES = ANY_SITES | TOKEN_SITES_ONLY


def moved(ci_fn: CIFunction) -> CIFunction:
    """The biases, and all else, moved off their start."""
    with torch.no_grad():
        for i, parameter in enumerate(ci_fn.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded(i)))
    return ci_fn


def built(data: str, ci_fn: CIFunction) -> ComponentModel:
    target, sites = {"vectors": (vectors_chain, VECTOR_SITES), "tokens": (tokens_chain, TOKEN_SITES)}[data]
    model = ComponentModel(target=target(), sites=sites, ci_fn=ci_fn, seed=SEED)
    moved(ci_fn)
    return model


def alone(kind: str) -> CIFunction:
    """A ci function without a target."""
    ci_fn = RECIPES[kind]()
    ci_fn.build({site: CIShape(d, C) for site, d, C in SHAPES}, seed=0)
    return moved(ci_fn)


SHAPES = [("embed", 3, 3), ("conv.pre_identity", 4, 2), ("conv", 4, 5), ("out", 2, 3)]


def inputs_of(*leading: int, seed: int = 0) -> dict[str, Tensor]:
    return {site: torch.randn(*leading, d, generator=seeded(seed + i)) for i, (site, d, _) in enumerate(SHAPES)}


def mixed(logits: dict[str, Tensor]) -> Tensor:
    """One number that sees every entry with its own weight, of both signs."""
    return torch.stack([(x * torch.cos(torch.arange(x.numel()).reshape(x.shape))).sum() for x in logits.values()]).sum()


def layers_of(network: nn.Module, get: Get) -> list[tuple[Tensor, Tensor]]:
    assert isinstance(network, MLP)
    return [(get(w), get(b)) for w, b in zip(network.weights, network.biases, strict=True)]


def block_in_oracle(block: nn.Module, get: Get) -> naive.Config:
    assert isinstance(block, Block)
    attention = None
    if block.attention is not None:
        settings, [(weight, bias)] = block.attention.settings, layers_of(block.attention.qkv, get)
        parts = zip(weight.chunk(3), bias.chunk(3), strict=True)
        attention = {
            **{"n_heads": settings.n_heads, "direction": settings.direction, "rope_base": settings.rope_base},
            **dict(zip("qkv", parts, strict=True)),
            "out": layers_of(block.attention.out, get)[0],
        }
    return {"attention": attention, "mlp": block.mlp and layers_of(block.mlp, get)}


def stage_in_oracle(stage: nn.Module, get: Get) -> naive.Config:
    assert isinstance(stage, Stage)
    return {
        "sites": list(stage.writes),
        "read": layers_of(stage.read, get)[0],
        "block": block_in_oracle(stage.block, get),
        "head": layers_of(stage.head, get)[0],
    }


def transformer_in_oracle(network: nn.Module, get: Get) -> naive.Config:
    assert isinstance(network, SiteTransformer)
    return {
        "reads": network.reads,
        "writes": list(network.writes),
        "read": layers_of(network.read, get)[0],
        "blocks": [block_in_oracle(block, get) for block in network.blocks],
        "head": layers_of(network.head, get)[0],
    }


def in_oracle(ci_fn: CIFunction, get: Get) -> naive.CiFn:
    """A ci function in the oracle's layout; `get` says what stands for a parameter: itself, or its gradient."""
    if isinstance(ci_fn, ReverseResidual):
        return {"kind": "reverse_residual", "stages": [stage_in_oracle(stage, get) for stage in ci_fn.stages]}
    if isinstance(ci_fn, ChunkwiseTransformer):
        networks = [transformer_in_oracle(network, get) for network in ci_fn.networks]
        return {"kind": "chunkwise_transformer", "transformers": networks}
    assert isinstance(ci_fn, GlobalTransformer)
    return {"kind": "global_transformer", "transformers": [transformer_in_oracle(ci_fn.network, get)]}


def oracle_of(model: ComponentModel) -> tuple[naive.Target, naive.CiFn]:
    return naive.trainable_copy(oracle_target(model), in_oracle(model.ci_fn, lambda p: p))


def gradients_in_oracle_order(model: ComponentModel, value: Tensor) -> list[Tensor]:
    components = [p for c in model.components.values() for p in (c.V, c.U)]
    parameters = [*components, *model.ci_fn.parameters()]
    found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    by_id = {id(p): g for p, g in zip(parameters, found, strict=True)}
    return [*found[: len(components)], *naive.ci_parameters(in_oracle(model.ci_fn, lambda p: by_id[id(p)]))]
