"""What a layerwise term costs when its forwards start at their site, and when they recompute what comes before.

    python benchmarks/layerwise.py --layers 2 4 8

Value and gradient of StochasticReconLayerwise (KL) on a language model, one thread, CPU time; the two ways take turns
on one model; medians over the rounds, and the greatest relative difference of their gradients.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor

from pdlightning.masking import EachSite, Uniform
from pdlightning.metrics import OutputKL, ReconstructionLoss
from pdlightning.modules import ComponentModel, SharedMLP
from pdlightning.observation import observe
from pdlightning.targets.language import LlamaSimpleMLP


def gradients(model: ComponentModel, batch: Tensor, *, late: bool) -> list[Tensor]:
    term = ReconstructionLoss(coeff=1.0, source=Uniform(), routing=EachSite(), comparison=OutputKL())
    step = torch.zeros((), dtype=torch.int32)
    observation = observe(model, batch, seed=0, step=step, training=True, outputs=late)
    if not late:
        observation = replace(observation, clean=replace(observation.clean, outputs={}, blocks={}))
    total, count = term.measure(observation)
    return list(torch.autograd.grad(total / count, list(model.components.parameters())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| layers | forwards | whole, ms | late, ms | ratio | difference |\n|---|---|---|---|---|---|")
    for n_layers in arguments.layers:
        sizes = {"vocab_size": 512, "n_ctx": 128, "d_model": 128, "n_heads": 4, "d_mlp": 512}
        target = LlamaSimpleMLP(n_layers=n_layers, seed=0, **sizes).requires_grad_(False)
        sites = {"h.*.attn.*_proj": 64, "h.*.mlp.*": 64}
        model = ComponentModel(target=target, sites=sites, ci_fn=SharedMLP(hidden=[16]))
        batch = torch.randint(512, (4, 128), generator=torch.Generator().manual_seed(0))
        times: dict[bool, list[float]] = {False: [], True: []}
        found: dict[bool, list[Tensor]] = {}
        for _ in range(arguments.rounds + 1):
            for late in times:
                begin = time.process_time()
                found[late] = gradients(model, batch, late=late)
                times[late].append(1e3 * (time.process_time() - begin))
        whole, late = (statistics.median(times[way][1:]) for way in (False, True))
        apart = max(float((a - b).norm() / b.norm()) for a, b in zip(found[True], found[False], strict=True))
        print(f"| {n_layers} | {len(model.components)} | {whole:.0f} | {late:.0f} | {whole / late:.2f} | {apart:.0e} |")


if __name__ == "__main__":
    main()
