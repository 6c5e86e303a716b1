"""The yardstick for language models: the published step in ordinary PyTorch (see `plain.py`, which has the toy models).

StochasticReconSubset + PersistentPGDRecon + importance minimality + faithfulness, with a transformer as ci function.
Hooks replace site outputs, D = W - (V U)^T is materialised once a step, KL by `F.kl_div`, one value fetched per loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from plain import LowerLeakyHardSigmoid
from torch import Generator, Tensor, nn

ADAM_BETAS, ADAM_EPS = (0.5, 0.99), 1e-8


class Shape(NamedTuple):
    """Of the target, the batch, the components and the ci function."""

    layers: int = 2
    d: int = 128
    heads: int = 4
    d_mlp: int = 512
    vocab: int = 4096
    sequence: int = 128
    batch: int = 8
    C: int = 256
    ci_d: int = 256
    ci_blocks: int = 2
    ci_heads: int = 4


def rope(x: Float[Tensor, "batch head sequence d"]) -> Float[Tensor, "batch head sequence d"]:
    half = x.shape[-1] // 2
    frequency = 10000 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device).unsqueeze(-1) * frequency
    cos, sin, (a, b) = angle.cos().to(x), angle.sin().to(x), x.split(half, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, *, causal: bool, bias: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d, bias=bias) for _ in range(4))

    def forward(self, x: Float[Tensor, "batch sequence d"]) -> Float[Tensor, "batch sequence d"]:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in projections)
        z = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=self.causal)
        return self.o_proj(z.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and GELU MLP."""

    def __init__(self, d: int, heads: int, d_mlp: int, *, causal: bool, bias: bool) -> None:
        super().__init__()
        self.attn = Attention(d, heads, causal=causal, bias=bias)
        self.c_fc, self.down_proj = nn.Linear(d, d_mlp, bias=bias), nn.Linear(d_mlp, d, bias=bias)

    def forward(self, x: Float[Tensor, "batch sequence d"]) -> Float[Tensor, "batch sequence d"]:
        x = x + self.attn(F.rms_norm(x, x.shape[-1:]))
        return x + self.down_proj(F.gelu(self.c_fc(F.rms_norm(x, x.shape[-1:]))))


class Transformer(nn.Module):
    """A causal language model with tied embedding: tokens to logits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab, shape.d)
        nn.init.normal_(self.wte.weight, std=0.1)  # logits of order 1
        self.h = nn.ModuleList(
            Block(shape.d, shape.heads, shape.d_mlp, causal=True, bias=False) for _ in range(shape.layers)
        )

    def forward(self, tokens: Int[Tensor, "batch sequence"]) -> Float[Tensor, "batch sequence vocab"]:
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        return F.rms_norm(x, x.shape[-1:]) @ self.wte.weight.T


def target_of(shape: Shape, device: str = "cpu") -> Transformer:
    torch.manual_seed(0)
    return Transformer(shape).to(device).requires_grad_(False).eval()


def tokens_of(shape: Shape, device: str = "cpu") -> Int[Tensor, "batch sequence"]:
    return torch.randint(shape.vocab, (shape.batch, shape.sequence), generator=Generator().manual_seed(0)).to(device)


class CITransformer(nn.Module):
    """All sites' RMS-normed inputs, concatenated, through a bidirectional transformer to the logits of all sites."""

    def __init__(self, d_in: int, d_out: int, shape: Shape) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(d_in, shape.ci_d), nn.Linear(shape.ci_d, d_out)
        blocks = (
            Block(shape.ci_d, shape.ci_heads, 4 * shape.ci_d, causal=False, bias=True) for _ in range(shape.ci_blocks)
        )
        self.blocks = nn.Sequential(*blocks)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        x = torch.cat([F.rms_norm(x, x.shape[-1:]) for x in inputs], -1)
        return self.head(self.blocks(self.embed(x)))


class PlainLanguageStep:
    """Trains V, U, the ci transformer and the persistent adversary (Adam, per sample and position, 2 warmups)."""

    def __init__(self, target: Transformer, shape: Shape, *, n_warmup: int = 2, source_lr: float = 0.01) -> None:
        self.target, self.shape, self.n_warmup, self.source_lr = target, shape, n_warmup, source_lr
        self.sites = {name: m for name, m in target.named_modules() if isinstance(m, nn.Linear)}
        device = target.wte.weight.device
        self.V = {s: nn.Parameter(torch.randn(m.in_features, shape.C, device=device) / math.sqrt(m.in_features))
                  for s, m in self.sites.items()}  # fmt: skip
        self.U = {s: nn.Parameter(torch.randn(shape.C, m.out_features, device=device) / math.sqrt(shape.C))
                  for s, m in self.sites.items()}  # fmt: skip
        d_in = sum(m.in_features for m in self.sites.values())
        self.ci_fn = CITransformer(d_in, len(self.sites) * shape.C, shape).to(device)
        widths = {s: shape.C for s in self.sites} | {f"{s}/delta": 1 for s in self.sites}
        leading = (shape.batch, shape.sequence)
        self.sources = {s: torch.rand(*leading, n, device=device) for s, n in widths.items()}
        self.moments = {s: (torch.zeros_like(r), torch.zeros_like(r)) for s, r in self.sources.items()}
        self.ascents = 0
        trained = [*self.V.values(), *self.U.values(), *self.ci_fn.parameters()]
        self.optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.0)

    def hooked(self, tokens: Tensor, hook: Callable[..., Any]) -> Tensor:
        with ExitStack() as stack:
            for site, module in self.sites.items():
                stack.enter_context(module.register_forward_hook(partial(hook, site)))
            return self.target(tokens)

    def recon(
        self, tokens: Tensor, clean: Tensor, ci: dict[str, Tensor], r: dict[str, Tensor], D: dict[str, Tensor],
        routes: dict[str, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """KL per position of a forward whose sites are ((x V) * m) U + m_D * (x D^T) where routed (spec C4, R3)."""
        masks = {s: c + (1 - c) * r[s] for s, c in ci.items()}

        def replace(site: str, module: nn.Linear, args: tuple[Tensor], output: Tensor) -> Tensor:
            (x,) = args
            y = ((x @ self.V[site]) * masks[site]) @ self.U[site] + r[f"{site}/delta"] * (x @ D[site].T)
            return y if routes is None else torch.where(routes[site].unsqueeze(-1), y, output)

        logits = self.hooked(tokens, replace)
        q, p = F.log_softmax(logits.flatten(0, 1), -1), F.log_softmax(clean.flatten(0, 1), -1)
        return F.kl_div(q, p, log_target=True, reduction="batchmean")

    def subset_routes(self) -> dict[str, Tensor]:
        leading, n = (self.shape.batch, self.shape.sequence), len(self.sites)
        device = self.target.wte.weight.device
        k = torch.randint(1, n + 1, (*leading, 1), device=device)
        ranks = torch.rand(*leading, n, device=device).argsort(-1).argsort(-1)
        return dict(zip(self.sites, (ranks < k).unbind(-1), strict=True))

    def ascend(self, gradients: dict[str, Tensor]) -> None:
        self.ascents += 1
        (b1, b2), t = ADAM_BETAS, self.ascents
        for s, g in gradients.items():
            m, v = self.moments[s]
            m.lerp_(g, 1 - b1)
            v.lerp_(g.square(), 1 - b2)
            update = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + ADAM_EPS)
            self.sources[s] = (self.sources[s] + self.source_lr * update).clamp(0, 1)

    def losses(self, tokens: Tensor) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}

        def capture(site: str, module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
            (inputs[site],) = args

        with torch.no_grad():
            clean = self.hooked(tokens, capture)
        logits = dict(zip(self.sites, self.ci_fn(list(inputs.values())).split(self.shape.C, -1), strict=True))
        lower = {s: LowerLeakyHardSigmoid.apply(x) for s, x in logits.items()}
        upper = [torch.where(x > 1, 1 + 0.01 * (x - 1), x.clamp(0, 1)) for x in logits.values()]
        D = {s: m.weight - (self.V[s] @ self.U[s]).T for s, m in self.sites.items()}
        fixed_ci, fixed_D = {s: c.detach() for s, c in lower.items()}, {s: d.detach() for s, d in D.items()}
        for _ in range(self.n_warmup):
            leaves = {s: r.detach().requires_grad_() for s, r in self.sources.items()}
            loss = self.recon(tokens, clean, fixed_ci, leaves, fixed_D, None)
            self.ascend(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))
        self.leaves = {s: r.detach().requires_grad_() for s, r in self.sources.items()}
        leading = (self.shape.batch, self.shape.sequence)
        noise = {s: torch.rand(*leading, r.shape[-1], device=r.device) for s, r in self.sources.items()}
        p = 1.0  # between the recipe's 2 and 0.4
        f = [((u + 1e-12) ** p).flatten(0, -2).mean(0) for u in upper]
        n = leading[0] * leading[1]
        return {
            "faithfulness": sum(d.square().sum() for d in D.values()) / sum(d.numel() for d in D.values()),
            "importance_minimality": torch.stack([(x + 0.5 * x * torch.log2(1 + n * x)).sum() for x in f]).sum(),
            "stochastic_recon_subset": self.recon(tokens, clean, lower, noise, D, self.subset_routes()),
            "persistent_pgd_recon": self.recon(tokens, clean, lower, self.leaves, D, None),
        }

    def step(self, tokens: Int[Tensor, "batch sequence"]) -> dict[str, float]:
        losses = self.losses(tokens)
        coeffs = dict(zip(losses, (1e7, 2e-4, 0.5, 0.5), strict=True))
        losses["total"] = torch.stack([coeffs[name] * loss for name, loss in losses.items()]).sum()
        self.optimizer.zero_grad()
        losses["total"].backward()
        # The gradient of the term itself: what the total's backward left, without the coefficient.
        self.ascend({s: leaf.grad / coeffs["persistent_pgd_recon"] for s, leaf in self.leaves.items()})
        nn.utils.clip_grad_norm_([*self.V.values(), *self.U.values()], 0.01)
        self.optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}
