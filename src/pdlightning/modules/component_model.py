"""The component model: a frozen target whose sites can run through masked subcomponents (spec 2-3, 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pdlightning.functional.random import KeyedRandom
from pdlightning.modules.batches import default_output, default_run_batch
from pdlightning.modules.ci import SQUASHINGS, CausalImportances, CIFunction, CIShape, Squash, site_key
from pdlightning.modules.passes import CurrentPass, Pass, Products, Run
from pdlightning.modules.site import Components, Site
from pdlightning.modules.surgery import find_sites, install, install_blocks, uninstall


class ComponentsBySite(nn.Module, Mapping[str, Components]):
    """Mapping site path -> components. State keys read `layers/0/mlp_in.V`, whatever the target's own keys are."""

    # A Mapping compares by content and so has no hash; a module compares by identity.
    __hash__ = nn.Module.__hash__  # pyright: ignore[reportAssignmentType]
    __eq__ = nn.Module.__eq__  # pyright: ignore[reportAssignmentType]

    def __init__(self, components: list[Components]):
        super().__init__()
        self._by_path = {c.path: c for c in components}
        for c in components:
            self.add_module(site_key(c.path), c)

    def __getitem__(self, path: str) -> Components:
        if path not in self._by_path:
            raise KeyError(f"No site {path!r}. The sites: {', '.join(self._by_path)}.")
        return self._by_path[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self._by_path)


class ComponentModel(nn.Module):
    """A frozen target with a site in the place of every matched module, and the ci function.

    Args:
        target: the network to decompose; no parameter may require grad (spec C8). Its modules are replaced in place;
            `restore` takes the target back unchanged.
        sites: pattern (fnmatch on module paths) -> C.
        ci_fn: predicts causal importances from the inputs of the sites.
        squash: how logits become ci (spec I1).
        seed: of the initial V, U and ci function.
        run_batch: (target, batch) -> the target's result; default see `default_run_batch`.
        output: result -> the tensor that is compared; default see `default_output`.
    """

    def __init__(
        self,
        *,
        target: nn.Module,
        sites: Mapping[str, int],
        ci_fn: CIFunction,
        squash: Squash = "leaky_hard",
        seed: int = 0,
        run_batch: Callable[[nn.Module, Any], Any] | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ):
        super().__init__()
        _check_frozen(target)
        if squash not in SQUASHINGS:
            raise ValueError(f"Unknown squash {squash!r}: expected one of {', '.join(SQUASHINGS)}.")
        specs = find_sites(target, sites)
        self._target = (target.eval(),)  # in a tuple: outside parameters(), state_dict() and train()
        self.current = CurrentPass()
        self.squash: Squash = squash
        self.run_batch = run_batch or default_run_batch
        self.output = output or default_output
        inside_out = [install(target, spec, self.current, seed=seed) for spec in reversed(specs)]
        self.components = ComponentsBySite(inside_out[::-1])
        install_blocks(target, list(self.components), self.current)
        self.ci_fn = ci_fn
        try:
            ci_fn.build({path: CIShape(_ci_width(ci_fn, c), c.C) for path, c in self.components.items()}, seed=seed)
        except Exception:
            self.restore()  # the target must not stay with sites that no model owns
            raise
        some = next(iter(self.components.values())).V
        ci_fn.to(device=some.device, dtype=some.dtype)

    def forward(self, work: Callable[[], Any]) -> Any:
        """Do the work where all parameters are at hand: elsewhere a sharded model has a part of them on each rank."""
        return work()

    @property
    def target(self) -> nn.Module:
        return self._target[0]

    def restore(self) -> nn.Module:
        """Take the target back as it was; this model is of no use afterwards."""
        uninstall(self.target)
        return self.target

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.target._apply(fn)  # the target is no submodule, but it moves with us
        return super()._apply(fn, recurse)

    def clean(self, batch: Any, *, outputs: bool = False) -> Run:
        """The target as it is, with the inputs of the sites (and outputs, and of blocks) written down; no gradient."""
        with torch.no_grad():
            return self._run(batch, Pass(inputs={}, outputs={} if outputs else None, blocks={} if outputs else None))

    def masked(
        self,
        batch: Any,
        masks: dict[str, Float[Tensor, "*leading C"]],
        *,
        delta_masks: dict[str, Float[Tensor, " *leading"]] | None = None,
        routes: dict[str, Bool[Tensor, " *leading"]] | None = None,
        outputs: bool = False,
        clean: Run | None = None,
    ) -> Run:
        """A forward in which exactly the sites in `masks` run through their subcomponents (spec C4-C6).

        `clean` is the clean run of the same batch: what it kept is not computed again.
        """
        for name, given in (("delta_masks", delta_masks), ("routes", routes)):
            if given is not None and given.keys() != masks.keys():
                raise ValueError(f"{name} must name the sites of masks, {sorted(masks)}, got {sorted(given)}.")
        if unknown := masks.keys() - self.components.keys():
            raise ValueError(f"masks name {sorted(unknown)}, but the sites are {list(self.components)}.")
        if self.current.edited is not None:
            raise RuntimeError(
                "An intervention is open, and a masked forward in it would be neither: leave the `with` block first, or"
                " give the masks to the intervention, masked(masks=...)."
            )
        return self._run(batch, Pass(masks, delta_masks, routes, outputs={} if outputs else None, clean=clean))

    def _run(self, batch: Any, now: Pass) -> Run:
        self.current.value = now
        try:
            output = self.output(self.run_batch(self.target, batch))
        finally:
            self.current.value = None
        inputs = now.inputs or {}
        products = {path: Products(self.components[path], x) for path, x in inputs.items()}
        return Run(output, inputs, now.outputs or {}, products, now.blocks or {})

    def causal_importances(self, clean: Run, *, distinct: int | None = None) -> CausalImportances:
        """ci from the clean inputs of the sites (spec I1).

        `distinct`: the samples after the first so many are copies of the last of these, and share its ci.
        """
        if missing := [path for path in self.components if path not in clean.inputs]:
            raise RuntimeError(f"The forward of the target never ran the sites {missing}: leave them out of `sites`.")
        inputs = {path: self._ci_input(clean.products[path]) for path in self.components}
        if distinct is None:
            logits = self.ci_fn(inputs)
        else:
            first = self.ci_fn({path: x[:distinct] for path, x in inputs.items()})
            logits = {path: _repeat_last(x, times=len(inputs[path]) - distinct) for path, x in first.items()}
        return CausalImportances.from_logits(logits, self.squash)

    def _ci_input(self, products: Products) -> Tensor:
        reads_activation = self.ci_fn.reads == "component" or products.components.kind == "embedding"
        return products.with_V() if reads_activation else products.components.as_components(products.x)

    def noisy_lower(self, ci: CausalImportances, random: KeyedRandom) -> dict[str, Tensor]:
        """The lower branch at 1.05 * x - 0.05 * u, u ~ U[0, 1]: what binomial sources interpolate (spec I3)."""
        lower, _ = SQUASHINGS[self.squash]
        return {
            path: lower(1.05 * x - 0.05 * random.uniform(x.shape[-1], "ci", path, "noise").to(x))
            for path, x in ci.logits.items()
        }


def _repeat_last(x: Tensor, *, times: int) -> Tensor:
    return torch.cat([x, x[-1:].expand(times, *x.shape[1:])])


def _ci_width(ci_fn: CIFunction, components: Components) -> int:
    return components.C if components.kind == "embedding" else components.d_in


def _check_frozen(target: nn.Module) -> None:
    if any(isinstance(module, Site) for module in target.modules()):
        raise ValueError("The target already has sites in it: call .restore() on its component model first.")
    trainable = [name for name, p in target.named_parameters() if p.requires_grad]
    if trainable:
        raise ValueError(
            f"The target must be frozen, but {len(trainable)} of its parameters require grad"
            f" ({', '.join(trainable[:3])}, ...)."
            " Call target.requires_grad_(False) first."
        )
