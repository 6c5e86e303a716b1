"""Edits with the masks they mean, written down by hand, and small transformers to edit."""

from __future__ import annotations

from typing import Any

import torch
from parity import TOKEN_SITES, VECTOR_SITES, seeded
from torch import Tensor

SITES = {"vectors": VECTOR_SITES, "tokens": TOKEN_SITES}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def edits_of(data: str) -> dict[str, tuple[dict[str, Any], dict[str, list[float]], dict[str, float]]]:
    """name -> (arguments, the mask of every subcomponent, of every delta), written down by hand."""
    first, last = list(SITES[data])[0], list(SITES[data])[-1]
    n, m = SITES[data][first], SITES[data][last]
    return {
        "nothing": ({}, {}, {}),
        "ablate": ({"ablate": {first: [0]}}, {first: [0] + [1] * (n - 1)}, {first: 1}),
        "ablate nothing": ({"ablate": {last: []}}, {last: [1] * m}, {last: 1}),
        "keep": ({"keep": {first: [1]}}, {first: [0, 1, 0][:n]}, {first: 0}),
        "keep with delta": ({"keep": {first: [1]}, "delta": True}, {first: [0, 1, 0][:n]}, {first: 1}),
        "scale": ({"scale": {last: {1: 2.5}}}, {last: [1, 2.5]}, {last: 1}),
        "scale and add": ({"scale": {last: {1: 2}}, "add": {last: {1: 0.5}}}, {last: [1, 2.5]}, {last: 1}),
        "a tensor": ({"add": {last: torch.tensor([0.5, -2.0])}}, {last: [1.5, -1]}, {last: 1}),
        "half a delta": (
            {"keep": {first: []}, "delta": {last: 0.5}}, {first: [0] * n, last: [1] * m}, {first: 0, last: 0.5}
        ),
        "no delta": ({"delta": False}, {s: [1] * C for s, C in SITES[data].items()}, dict.fromkeys(SITES[data], 0)),
        "from masks": (
            {"masks": {last: torch.tensor([0.25, 0.5])}, "add": {last: {0: 1.0}}}, {last: [1.25, 0.5]}, {last: 0}
        ),
    }  # fmt: skip


def transformer(name: str, *, tied: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    common = {"vocab_size": 23, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if name == "gpt2":
        shape = {"n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}
        model: Any = GPT2LMHeadModel(GPT2Config(**shape, **common))
    else:
        shape = {"max_position_embeddings": 12, "hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, **common))
    for i, parameter in enumerate(model.parameters()):
        parameter.data.normal_(std=0.4, generator=seeded(i))
    return model.eval().requires_grad_(False)
