"""The yardstick of our speed claims: the published training step as its pseudocode reads, in ordinary PyTorch.

Hooks replace site outputs, D = W - (V U)^T is materialised once a step, each logged value is fetched with `.item()`.
It shares no code with the package, so a change there cannot move it. Prints a table: `python benchmarks/plain.py`.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from datetime import date
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn


class LowerLeakyHardSigmoid(torch.autograd.Function):
    """clamp(x, 0, 1); at x <= 0 a push upward still passes, scaled by alpha = 0.01 (spec I1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,), (g,) = ctx.saved_tensors, grad_outputs
        return torch.where(x > 0, g * (x <= 1), 0.01 * g.clamp(max=0))


class MLP(nn.Module):
    """GELU MLP on `[batch, *per, sizes[0]]`: one per subcomponent (per = (C,)) or one in all (per = ()) (spec I2)."""

    def __init__(self, *, sizes: list[int], per: tuple[int, ...], generator: Generator) -> None:
        super().__init__()
        stds = [math.sqrt(2 / i) for i in sizes[:-2]] + [1 / math.sqrt(sizes[-2])]
        shapes = zip(sizes[:-1], sizes[1:], stds, strict=True)
        self.weights = nn.ParameterList(normal(*per, i, o, std=std, generator=generator) for i, o, std in shapes)
        self.biases = nn.ParameterList(torch.zeros(*per, o, device=generator.device) for o in sizes[1:])
        self.equation = "bci,cio->bco" if per else "bi,io->bo"

    def forward(self, x: Float[Tensor, "batch *per d_in"]) -> Float[Tensor, "batch *per d_out"]:
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.einsum(self.equation, F.gelu(x) if layer else x, weight) + bias
        return x


def normal(*shape: int, std: float, generator: Generator) -> nn.Parameter:
    return nn.Parameter(std * torch.randn(*shape, generator=generator, device=generator.device))


class PlainStep:
    """Trains V, U and the ci functions, one whole step per call of `step`; leaves the target as it found it."""

    def __init__(
        self, target: nn.Module, sites: dict[str, int], *, batch_size: int, ci_hidden: list[int],
        importance_coeff: float, p: float, lr: float, steps: int,
        ci_fn: Literal["scalar_mlp", "shared_mlp"] = "scalar_mlp", schedule: Literal["cosine", "constant"] = "cosine",
    ) -> None:  # fmt: skip
        if ci_fn not in ("scalar_mlp", "shared_mlp") or schedule not in ("cosine", "constant"):
            raise ValueError(f"expected scalar_mlp | shared_mlp and cosine | constant, got {ci_fn!r} and {schedule!r}")
        if trainable := [name for name, q in target.named_parameters() if q.requires_grad]:
            raise ValueError(f"expected a frozen target, {trainable} train: call target.requires_grad_(False)")
        linears = {name: module for name, module in target.named_modules() if isinstance(module, nn.Linear)}
        if not sites or not sites.keys() <= linears.keys():
            raise ValueError(f"expected sites among the nn.Linears {list(linears)}, got {list(sites)}: rename them")
        self.target, self.modules = target, {site: linears[site] for site in sites}
        self.batch_size, self.importance_coeff, self.p = batch_size, importance_coeff, p
        self.lr, self.steps, self.schedule, self.scalar, self.done = lr, steps, schedule, ci_fn == "scalar_mlp", 0
        self.generator = g = Generator(next(iter(self.modules.values())).weight.device).manual_seed(0)
        self.V, self.U, self.ci_fns = {}, {}, {}
        for site, C in sites.items():
            d_out, d_in = self.modules[site].weight.shape
            self.V[site] = normal(d_in, C, std=1 / math.sqrt(d_in), generator=g)
            self.U[site] = normal(C, d_out, std=1 / math.sqrt(C), generator=g)
            sizes = [1, *ci_hidden, 1] if self.scalar else [d_in, *ci_hidden, C]
            self.ci_fns[site] = MLP(sizes=sizes, per=(C,) if self.scalar else (), generator=g)
        trained = [*self.V.values(), *self.U.values(), *(q for f in self.ci_fns.values() for q in f.parameters())]
        self.optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)

    def rand(self, size: int) -> Float[Tensor, "batch size"]:
        return torch.rand(self.batch_size, size, generator=self.generator, device=self.generator.device)

    def hooked_forward(self, batch: Tensor, sites: Iterable[str], hook: Callable[..., Any]) -> Tensor:
        with ExitStack() as stack:
            for site in sites:
                stack.enter_context(self.modules[site].register_forward_hook(partial(hook, site)))
            return self.target(batch)

    def recon(self, batch: Tensor, clean: Tensor, ci: dict[str, Tensor], D: dict[str, Tensor]) -> Tensor:
        """Squared error with the sites in `ci` replaced by ((x V) * m) U + m_D * (x D^T) + b (spec C4, C5, R3)."""
        masks = {site: c + (1 - c) * self.rand(c.shape[-1]) for site, c in ci.items()}
        delta_masks = {site: self.rand(1) for site in ci}

        def replace(site: str, module: nn.Linear, args: tuple[Tensor], output: Tensor) -> Tensor:
            (x,) = args
            y = ((x @ self.V[site]) * masks[site]) @ self.U[site] + delta_masks[site] * (x @ D[site].T)
            return y if module.bias is None else y + module.bias

        return F.mse_loss(self.hooked_forward(batch, ci, replace), clean)

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}

        def capture(site: str, module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
            (inputs[site],) = args

        with torch.no_grad():
            clean = self.hooked_forward(batch, self.modules, capture)
        seen = {s: (x @ self.V[s]).unsqueeze(-1) if self.scalar else x for s, x in inputs.items()}
        logits = {s: self.ci_fns[s](x).view(self.batch_size, -1) for s, x in seen.items()}
        lower = {s: LowerLeakyHardSigmoid.apply(x) for s, x in logits.items()}
        upper = [torch.where(x > 1, 1 + 0.01 * (x - 1), x.clamp(0, 1)) for x in logits.values()]
        D = {s: module.weight - (self.V[s] @ self.U[s]).T for s, module in self.modules.items()}
        layerwise = [self.recon(batch, clean, {s: lower[s]}, D) for s in lower]
        return {
            "faithfulness": torch.cat([d.flatten() for d in D.values()]).square().mean(),  # spec L2
            "importance_minimality": torch.stack([(u + 1e-12).pow(self.p).mean(0).sum() for u in upper]).sum(),
            "stochastic_recon": self.recon(batch, clean, lower, D),
            "stochastic_recon_layerwise": torch.stack(layerwise).mean(),  # counts add up as sums do: spec R2, R4
        }

    def step(self, batch: Float[Tensor, "batch n_features"]) -> dict[str, float]:
        """One step on the summed losses, importance minimality times its coeff; returns each unweighted, and total."""
        if len(batch) != self.batch_size or self.done >= self.steps:
            got = f"{len(batch)} rows at step {self.done}: build a matching PlainStep"
            raise ValueError(f"expected {self.batch_size} rows a step for {self.steps} steps, got {got}")
        t = self.done / max(self.steps - 1, 1) if self.schedule == "cosine" else 0.0
        self.optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * t)) / 2
        losses = self.losses(batch)
        coeffs = {name: 1.0 for name in losses} | {"importance_minimality": self.importance_coeff}
        losses["total"] = torch.stack([coeffs[name] * loss for name, loss in losses.items()]).sum()
        self.optimizer.zero_grad()
        losses["total"].backward()
        self.optimizer.step()
        self.done += 1
        return {name: loss.item() for name, loss in losses.items()}


class Residual(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


def tms_5_2(generator: Generator) -> nn.Module:
    """relu(W^T W x + b): 5 features in 2 dimensions, unit-norm random columns; the two uses of W are two sites."""
    W = F.normalize(torch.randn(2, 5, generator=generator, device=generator.device), dim=0)
    linear = partial(nn.Linear, device="meta")  # whose own init then draws nothing from the global generator
    target = nn.Sequential(OrderedDict(linear1=linear(5, 2, bias=False), linear2=linear(2, 5), relu=nn.ReLU()))
    weights = {"linear1.weight": W, "linear2.weight": W.T.contiguous(), "linear2.bias": torch.zeros_like(W[0])}
    target.load_state_dict(weights, assign=True)
    return target.requires_grad_(False).eval()


def resid_mlp(generator: Generator, *, n_features: int, n_layers: int, neurons: int) -> nn.Module:
    """h = x W_E, then h += mlp_out(relu(mlp_in(h))) per layer, then h W_E^T; d 1000, unit-norm rows of W_E."""
    shapes = ((n_features, 1000), *((neurons, 1000), (1000, neurons)) * n_layers)
    E, *matrices = (F.normalize(torch.randn(s, generator=generator, device=generator.device)) for s in shapes)
    linear = partial(nn.Linear, bias=False, device="meta")
    weights, blocks = {"embed.weight": E.T.contiguous(), "unembed.weight": E}, []
    for i in range(n_layers):
        blocks.append(
            Residual(OrderedDict(mlp_in=linear(1000, neurons), relu=nn.ReLU(), mlp_out=linear(neurons, 1000)))
        )
        weights[f"blocks.{i}.mlp_in.weight"], weights[f"blocks.{i}.mlp_out.weight"] = matrices[2 * i : 2 * i + 2]
    parts = dict(embed=linear(n_features, 1000), blocks=nn.Sequential(*blocks), unembed=linear(1000, n_features))
    target = nn.Sequential(OrderedDict(parts))
    target.load_state_dict(weights, assign=True)
    return target.requires_grad_(False).eval()


def sparse_features(batch_size: int, n_features: int, low: float, probability: float, generator: Generator) -> Tensor:
    """`[batch_size, n_features]` of U[low, 1] with the given probability, else 0 (spec section 9)."""
    values, draws = torch.rand(2, batch_size, n_features, generator=generator, device=generator.device)
    return (low + (1 - low) * values) * (draws < probability)


class Recipe(NamedTuple):
    target: Callable[[Generator], nn.Module]
    batch: Callable[[Generator], Tensor]
    sites: dict[str, int]
    settings: dict[str, Any]  # PlainStep's arguments but steps


RECIPES = {
    "tms_5-2": Recipe(
        tms_5_2, partial(sparse_features, 4096, 5, 0.0, 0.05), {"linear1": 20, "linear2": 20},
        dict(batch_size=4096, ci_hidden=[16], importance_coeff=3e-3, p=1.0, lr=1e-3, schedule="cosine")),
    "resid_mlp1": Recipe(
        partial(resid_mlp, n_features=100, n_layers=1, neurons=50), partial(sparse_features, 2048, 100, -1.0, 0.01),
        {"blocks.0.mlp_in": 100, "blocks.0.mlp_out": 100},
        dict(batch_size=2048, ci_hidden=[16], importance_coeff=1e-5, p=2.0, lr=2e-3, schedule="constant")),
}  # fmt: skip


def main() -> None:
    """Median wall time of 30 eager steps after 5 to warm up, on batches made beforehand."""
    print(f"{date.today()}  {platform.machine()}  {os.cpu_count()} cores  torch {torch.__version__}  eager")
    print(f"{'recipe':<12}{'threads':>8}{'ms/step':>10}{'steps/s':>10}")
    for (name, recipe), threads in product(RECIPES.items(), (1, 2)):
        torch.set_num_threads(threads)
        generator, times = Generator().manual_seed(0), []
        plain = PlainStep(recipe.target(generator), recipe.sites, steps=35, **recipe.settings)
        for batch in [recipe.batch(generator) for _ in range(35)]:
            start = time.perf_counter()
            plain.step(batch)
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[5:])
        print(f"{name:<12}{threads:>8}{1000 * seconds:>10.2f}{1 / seconds:>10.1f}")


if __name__ == "__main__":
    main()
