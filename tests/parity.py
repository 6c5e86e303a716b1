"""One small model twice: the package's modules, and the oracle's dictionaries holding the same numbers.

Chains of layers cover every kind of site. `oracle_of` reads a component model into leaves of the oracle, and
`in_oracle_layout` brings the package's gradients into the oracle's order and orientation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import naive
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pdlightning.masking import (
    PGD,
    AllSites,
    Bernoulli,
    Binomial,
    Constant,
    EachSite,
    Routing,
    Source,
    Uniform,
    UniformSubset,
)
from pdlightning.metrics import Comparison, HiddenMSE, OutputKL, OutputMSE
from pdlightning.modules import CIFunction, ComponentModel, GlobalMLP, ScalarMLP, SharedMLP, VectorMLP
from pdlightning.modules.ci import Squash, site_key
from pdlightning.observation import Observation, observe

CI_FUNCTIONS: dict[str, type[Any]] = {
    "scalar_mlp": ScalarMLP,
    "vector_mlp": VectorMLP,
    "shared_mlp": SharedMLP,
    "global_mlp": GlobalMLP,
}
SQUASHINGS: dict[Squash, dict[str, str]] = {
    "leaky_hard": {"lower": "lower_leaky_hard", "upper": "upper_leaky_hard"},
    "sigmoid": {"lower": "sigmoid", "upper": "sigmoid"},
    "hard": {"lower": "hard", "upper": "hard"},
    "leaky": {"lower": "leaky_hard", "upper": "leaky_hard"},
    "swish_hard": {"lower": "swish_hard", "upper": "swish_hard"},
}
ROUTINGS: dict[str, Routing] = {
    "all": AllSites(),
    "uniform_subset": UniformSubset(),
    "bernoulli": Bernoulli(p=0.6),
    "each_site": EachSite(),
}
COMPARISONS: dict[str, Comparison] = {"mse": OutputMSE(), "kl": OutputKL(), "hidden": HiddenMSE()}
VOCAB, SEED, STEP = 5, 3, 7


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Chain(nn.ModuleDict):
    """Layers that run in their order."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = layer(x)
        return x


def frozen(chain: Chain, seed: int = 0) -> Chain:
    """Every weight and bias drawn anew from its own seed, and frozen."""
    for i, parameter in enumerate(chain.requires_grad_(False).parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=seeded(1000 * seed + i)))
    return chain


def vectors_chain() -> Chain:
    """3 -> 2 -> 3: linear without and with bias."""
    return frozen(Chain({"first": nn.Linear(3, 2, bias=False), "relu": nn.ReLU(), "second": nn.Linear(2, 3)}))


def tokens_chain() -> Chain:
    """Token ids -> 2 -> 3 -> 2: an embedding, a Conv1D with an identity site in front, and a linear layer."""
    layers = {"embed": nn.Embedding(VOCAB, 2), "conv": Conv1D(3, 2), "relu": nn.ReLU(), "out": nn.Linear(3, 2)}
    return frozen(Chain(layers))


VECTOR_SITES = {"first": 3, "second": 2}
TOKEN_SITES = {"embed": 2, "conv.pre_identity": 2, "conv": 3, "out": 2}


def built(
    data: str = "vectors", *, ci: str = "shared_mlp", hidden: Sequence[int] = (3,), squash: Squash = "leaky_hard"
) -> ComponentModel:
    """A component model of one of the chains, its ci biases moved off zero."""
    target, sites = {"vectors": (vectors_chain, VECTOR_SITES), "tokens": (tokens_chain, TOKEN_SITES)}[data]
    ci_fn: CIFunction = CI_FUNCTIONS[ci](hidden=list(hidden))
    model = ComponentModel(target=target(), sites=sites, ci_fn=ci_fn, squash=squash, seed=SEED)
    with torch.no_grad():
        for i, parameter in enumerate(ci_fn.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded(i)))
    return model


def batch_of(data: str, leading: Sequence[int], seed: int = 0) -> Tensor:
    if data == "tokens":
        return torch.randint(VOCAB, tuple(leading), generator=seeded(seed))
    return torch.randn(*leading, 3, generator=seeded(seed))


def networks(ci_fn: CIFunction) -> list[nn.Module]:
    """The networks of a ci function, one for each site or one for all."""
    return [ci_fn.network] if isinstance(ci_fn, GlobalMLP) else list(ci_fn.networks.values())  # type: ignore[union-attr]


def layers_of(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of every layer in the oracle's orientation: (out, in), or (C, out, in)."""
    pairs = zip(network.weights, network.biases, strict=True)  # type: ignore[arg-type]
    return [(w.mT if w.ndim == 3 else w, b) for w, b in pairs]


def oracle_target(model: ComponentModel) -> naive.Target:
    """The target of a component model in the oracle's words."""
    sites = {}
    for path, c in model.components.items():
        weight = None if c.kind == "identity" else c._frozen[0].weight
        sites[path] = naive.make_site(c.kind, weight, c.target_bias, c.V.detach(), c.U.detach())  # type: ignore[arg-type]
    layers = [name for path in model.target for name in (f"{path}.pre_identity", path) if name in [*sites, "relu"]]  # type: ignore[union-attr]
    return {"sites": sites, "layers": layers}


def oracle_of(model: ComponentModel) -> tuple[naive.Target, naive.CiFn]:
    """The same numbers as float64 leaves of the oracle."""
    target = oracle_target(model)
    kind = next(kind for kind, cls in CI_FUNCTIONS.items() if isinstance(model.ci_fn, cls))
    if kind == "global_mlp":
        ci_fn: naive.CiFn = {"kind": kind, "layers": layers_of(networks(model.ci_fn)[0])}
    else:
        ci_fn = {"kind": kind, "sites": {s: layers_of(model.ci_fn.networks[site_key(s)]) for s in target["sites"]}}  # type: ignore[index]
    return naive.trainable_copy(target, ci_fn)


def in_oracle_layout(model: ComponentModel) -> list[Tensor]:
    """Trained tensors as views of the package's parameters, in the order of `oracle_leaves`."""
    components = [tensor for c in model.components.values() for tensor in (c.V, c.U)]
    return components + [t for network in networks(model.ci_fn) for pair in layers_of(network) for t in pair]


def oracle_leaves(target: naive.Target, ci_fn: naive.CiFn) -> list[Tensor]:
    return naive.component_parameters(target) + naive.ci_parameters(ci_fn)


def gradients_of(model: ComponentModel, value: Tensor) -> list[Tensor]:
    """Gradients of all trained parameters in the oracle's layout; zero where the value does not see them."""
    components = [p for c in model.components.values() for p in (c.V, c.U)]
    pairs = [pair for n in networks(model.ci_fn) for pair in zip(n.weights, n.biases, strict=True)]  # type: ignore[arg-type]
    parameters = components + [p for pair in pairs for p in pair]
    found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True, retain_graph=True)
    return [g.mT if p.ndim == 3 else g for p, g in zip(parameters, found, strict=True)]


def observed(model: ComponentModel, batch: Tensor, *, first: int = 0, step: int = STEP) -> Observation:
    now = torch.tensor(step, dtype=torch.int32)
    samples = torch.arange(first, first + len(batch), dtype=torch.int32)
    return observe(model, batch, seed=SEED, step=now, training=True, outputs=True, samples=samples)


def source_of(name: str, *, delta: bool = True) -> Source:
    """uniform, binomial, constant:<value>, or pgd:<init>:<scope> of two steps."""
    kind, *rest = name.split(":")
    match kind:
        case "uniform":
            return Uniform(delta=delta)
        case "binomial":
            return Binomial(delta=delta)
        case "constant":
            return Constant(value=float(rest[0]))
        case _:
            return PGD(n_steps=2, step_size=0.3, init=rest[0], scope=rest[1], delta=delta)  # type: ignore[arg-type]


def term_of(name: str, routing: str, comparison: str, *, delta: bool = True) -> naive.Config:
    """The oracle's words for the same reconstruction term."""
    kind, *rest = name.split(":")
    fields: naive.Config = {"constant": lambda: {"value": float(rest[0])}, "pgd": lambda: _pgd(*rest)}.get(kind, dict)()
    return {
        "kind": "reconstruction", "coeff": 1.0, "source": kind, "routing": routing, "comparison": comparison,
        "delta": delta, "p": 0.6, **fields,
    }  # fmt: skip


def _pgd(init: str, scope: str) -> naive.Config:
    return {"init": init, "scope": scope, "n_steps": 2, "step_size": 0.3}


def oracle_config(terms: dict[str, naive.Config], *, squash: Squash = "leaky_hard") -> naive.Config:
    """What `naive.step_losses` needs; binomial sources bring their noise."""
    binomial = any(term.get("source") == "binomial" for term in terms.values())
    sampling = "binomial" if binomial else "continuous"
    return {"seed": SEED, "steps": 20, "sampling": sampling, "terms": terms, **SQUASHINGS[squash]}


def assert_same(ours: Tensor, theirs: Tensor, what: str = "value") -> None:
    """Equal to 1e-10, absolutely and relatively."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda m: f"{what}: {m}")


def assert_same_value_and_gradients(
    model: ComponentModel, ours: Tensor, theirs: Tensor, target: naive.Target, ci_fn: naive.CiFn
) -> None:
    assert_same(ours, theirs)
    leaves = oracle_leaves(target, ci_fn)
    for i, (g, expected) in enumerate(zip(gradients_of(model, ours), naive.gradients(theirs, leaves), strict=True)):
        assert_same(g, expected, f"gradient {i}")
