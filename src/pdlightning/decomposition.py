"""ParameterDecomposition: the LightningModule that takes a target apart (spec 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from pdlightning import functional as pf
from pdlightning.compiling import Compile, check_graphs, compiled
from pdlightning.editing import Editing
from pdlightning.functional.losses import Pair
from pdlightning.guards import FiniteGuard
from pdlightning.masking import PersistentPGD, Source
from pdlightning.metrics.loss import Loss
from pdlightning.modules.batches import empty_last
from pdlightning.modules.ci import CIFunction, Squash
from pdlightning.modules.component_model import ComponentModel, ComponentsBySite
from pdlightning.observation import Observation, observe
from pdlightning.optimization import AdamW, FaithfulnessWarmup
from pdlightning.ranks import gathered, means_over_ranks, own_part
from pdlightning.sharding import full, shard
from pdlightning.sharing.pretrained import Pretrained


class Step(NamedTuple):
    """What one training step computes: the total loss, every term's (sum, count), and the lower ci of every site."""

    total: Tensor
    pairs: dict[str, Pair]
    ci_lower: dict[str, Tensor]


class ParameterDecomposition(Editing, Pretrained, LightningModule):
    """Decomposes the weights of a frozen target into rank-one subcomponents and a ci function.

    Args:
        target: the network to take apart, with no parameter that requires grad. Sites are put into it in place.
        sites: pattern (fnmatch on module paths) -> C, the number of subcomponents.
        ci_fn: from `pdlightning.modules`, such as `SharedMLP(hidden=[256])`.
        losses: name -> loss, from `pdlightning.metrics`; the total is sum_i coeff_i * loss_i (spec L1).
        components_optimizer, ci_optimizer: AdamW settings of V, U and of the ci function.
        faithfulness_warmup: steps on faithfulness alone before step 0, or None.
        squash: how ci logits become ci (spec I1).
        seed: of the initial weights and of every draw (spec D2).
        compile: compile the losses of a step with torch.compile; "graphs" replays them as CUDA graphs too.
        run_batch: (target, batch) -> result; by default target(x), target(batch[0]) or target(**batch).
        output: result -> the tensor compared; by default the tensor, `.logits`, or the first of a tuple.
    """

    step_now: Tensor
    part_now: Tensor

    def __init__(
        self,
        *,
        target: nn.Module,
        sites: Mapping[str, int],
        ci_fn: CIFunction,
        losses: Mapping[str, Loss],
        components_optimizer: AdamW | None = None,
        ci_optimizer: AdamW | None = None,
        faithfulness_warmup: FaithfulnessWarmup | None = None,
        squash: Squash = "leaky_hard",
        seed: int = 0,
        compile: Compile = False,
        run_batch: Callable[[nn.Module, Any], Any] | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ):
        super().__init__()
        if not losses:
            raise ValueError(
                "No losses: pass losses={name: loss}, such as {'faithfulness': FaithfulnessLoss(coeff=1.0)}."
            )
        if not any(loss.trained for loss in losses.values()):
            raise ValueError(f"Every loss has coeff 0, so nothing would be trained: {', '.join(losses)}.")
        self.persistent = [m for loss in losses.values() for m in loss.modules() if isinstance(m, PersistentPGD)]
        if len({id(source) for source in self.persistent}) < len(self.persistent):
            raise ValueError("Two losses share one persistent adversary: give each of them its own.")
        self.noisy = any(m.noisy for loss in losses.values() for m in loss.modules() if isinstance(m, Source))
        self.model = ComponentModel(
            target=target, sites=sites, ci_fn=ci_fn, squash=squash, seed=seed, run_batch=run_batch, output=output
        )
        self.losses = nn.ModuleDict(losses)
        self.terms = dict(losses)  # the same objects, with their type
        for name, loss in self.terms.items():
            loss.term = name
            loss.prepare(self.model)
        self.optimizer_settings = {
            "components": components_optimizer or AdamW(),
            "ci_fn": ci_optimizer or AdamW(),
        }
        self.faithfulness_warmup = faithfulness_warmup
        self.seed = seed
        self.guard = FiniteGuard(self.model)
        self.register_buffer("step_now", torch.zeros((), dtype=torch.int32), persistent=False)
        self.register_buffer("part_now", torch.zeros((), dtype=torch.int32), persistent=False)
        self.micro_batches = 1
        self.compiled_step = compiled(self._compute_step, compile, keep_less=ci_fn.checkpoint_activations)
        self.as_graphs = compile == "graphs"
        self.primed = False

    @property
    def target(self) -> nn.Module:
        return self.model.target

    @property
    def components(self) -> ComponentsBySite:
        return self.model.components

    def compute_step(self, batch: Any, step: Tensor) -> Step:
        rows = differing = None
        if (found := empty_last(batch)) is not None:
            rows, distinct = found
            batch, differing = batch[rows], rows[:distinct]
        if self.compiled_step is None:
            return self._compute_step(batch, step, rows, differing)
        if differing is not None:
            torch._dynamo.maybe_mark_dynamic(differing, 0)  # its length changes with every batch
        if not self.primed:
            # Makes what the compiled step reads: the constants of the draws, the sources of persistent adversaries.
            with torch.no_grad():
                self._compute_step(batch, step, rows, differing, training=False)
            self.primed = True
        return self.compiled_step(batch, step, rows, differing)

    def _compute_step(
        self, batch: Any, step: Tensor, rows: Tensor | None, differing: Tensor | None, training: bool = True
    ) -> Step:
        """One clean forward, one ci, all losses (spec 6 parts 3 to 6).

        `rows` are the places of the samples in the batch as it came, where that is not their order; samples after
        `differing` are copies of the last of `differing`.
        """
        observation = observe(
            self.model,
            batch,
            seed=self.seed,
            step=step,
            training=training,
            outputs=any(loss.needs_outputs for loss in self.terms.values()),
            noisy=self.noisy,
            rows=rows,
            part=self.part_now if self.micro_batches > 1 else None,
            distinct=None if differing is None else len(differing),
        )
        if training and self.persistent:
            self.warm_up(observation)
        pairs, weighted = {}, []
        for name, loss in self.terms.items():
            with torch.set_grad_enabled(loss.trained and training):
                total, count = pairs[name] = loss.measure(observation)
            if loss.trained:
                weighted.append(loss.coeff.now * total / count)
        return Step(torch.stack(weighted).sum(), pairs, observation.ci.lower)

    @torch.compiler.disable(recursive=False)  # gradients are taken here; what is differentiated may be compiled
    def warm_up(self, observation: Observation) -> None:
        """Persistent sources climb, with ci, V and U as they are (spec 6 part 5)."""
        for loss in self.terms.values():
            loss.warm_up(observation)

    def configure_model(self) -> None:
        """Shard what is trained, where the Trainer's strategy says so."""
        mesh: Any = self.device_mesh
        if mesh is not None and not isinstance(self.model, FSDPModule):
            shard(self.model, mesh["data_parallel"], blocks=self.compiled_step is None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.part_now.fill_(batch_idx % self.micro_batches)  # an accumulated batch has numbers for each of its samples
        total, pairs, ci_lower = self.model(lambda: self.compute_step(batch, self.step_now))
        for name, loss in self.terms.items():
            loss.update(pairs[name])
        log_every = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        log_now = (self.global_step + 1) % log_every == 0 and (batch_idx + 1) % self.micro_batches == 0
        if log_now or total.device.type == "cpu":  # elsewhere the look would make the host wait in every step
            self.guard.check(batch, total, pairs, ci_lower, step=self.global_step)
        if log_now:
            self.log_step(total, ci_lower)
        return total

    def log_step(self, total: Tensor, ci_lower: dict[str, Tensor]) -> None:
        """Every term unweighted under its own name, averaged since the last log; the total and L0 of this step."""
        values = {f"loss/{name}": loss.compute() for name, loss in self.terms.items()}
        for loss in self.terms.values():
            loss.reset()
        l0 = torch.stack([pf.l0(lower, 0.0).float().mean() for lower in ci_lower.values()]).sum()
        values["loss/total"], values["train/ci_l0"] = means_over_ranks([total.detach(), l0.to(total)])
        for name, settings in self.optimizer_settings.items():
            values[f"lr/{name}"] = torch.tensor(settings.lr_at(self.global_step, self.steps))
        self.log_dict(values, logger=False)  # for callbacks that watch a value
        # Lightning would write the row only after the checkpoint of this step, under the number of the step before.
        for logger in self.loggers:
            logger.log_metrics({name: float(value) for name, value in values.items()}, step=self.global_step + 1)

    def of_samples(self, state: Mapping[str, Tensor]) -> dict[str, int]:
        """Names in a state dict that have an axis of samples, and which: each rank holds its own samples alone."""
        found: dict[str, int] = {}
        for path, module in self.named_modules():
            if isinstance(module, PersistentPGD) and module.rows is None:
                dim = module.held_as.sample_dim
                found |= {name: dim for name, x in state.items() if name.startswith(f"{path}.held.") and x.ndim > dim}
        return found

    def whole_state_dict(self) -> dict[str, Tensor]:
        """The state with all samples of all ranks, the same on each of them; every rank asks at the same time."""
        state = {name: full(x) for name, x in self.state_dict().items()}
        return {**state, **{name: gathered(state[name], dim=dim) for name, dim in self.of_samples(state).items()}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """All samples of all ranks: any number of ranks can go on from it."""
        state = checkpoint["state_dict"]
        state.update({name: gathered(state[name], dim=dim) for name, dim in self.of_samples(state).items()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        state.update({name: own_part(state[name], dim=dim) for name, dim in self.of_samples(state).items()})

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """DistributedDataParallel would give every rank the buffers of the first one, and so its sources."""
        return [name for name, _ in self.named_buffers()]

    def set_progress(self, step: int) -> None:
        """Bring the keys of the draws and every schedule to this step (spec 6 part 1)."""
        self.step_now.fill_(step)
        for loss in self.terms.values():
            loss.set_progress(step, self.steps)

    def on_fit_start(self) -> None:
        """The length of the training, which every schedule is a fraction of; what cannot be trained is refused."""
        self.steps = int(
            self.trainer.max_steps if self.trainer.max_steps > 0 else self.trainer.estimated_stepping_batches
        )
        self.micro_batches = self.trainer.accumulate_grad_batches
        if self.as_graphs:
            check_graphs(self.device, ranks=self.trainer.world_size, micro_batches=self.micro_batches)
        for loss in self.terms.values():
            loss.check_training(micro_batches=self.micro_batches, loss_scaled=self.trainer.precision == "16-mixed")

    def on_train_start(self) -> None:
        if self.faithfulness_warmup is not None and self.global_step == 0:
            self.faithfulness_warmup.run(self.model)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.set_progress(self.global_step)
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        if batch_idx % self.micro_batches == 0:
            optimizer.zero_grad()  # Lightning would keep the gradients of the last step through the forward of this one
        self.set_learning_rates(optimizer, self.global_step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.after_backward()

    def after_backward(self) -> None:
        """After the backward of a step, and before its update: persistent sources ascend (spec 6 part 8)."""
        for loss in self.terms.values():
            loss.after_backward()

    def set_learning_rates(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Each group by its own schedule, a pure function of the step."""
        for group in optimizer.param_groups:
            group["lr"] = self.optimizer_settings[group["name"]].lr_at(step, self.steps)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = {"components": self.components.parameters(), "ci_fn": self.model.ci_fn.parameters()}
        groups = [settings.group(name, parameters[name]) for name, settings in self.optimizer_settings.items()]
        return torch.optim.AdamW(groups, fused=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Each group by its own norm, with norm + 1e-6 in the denominator (spec 6 part 9)."""
        if gradient_clip_val is not None:
            raise ValueError(
                "Trainer(gradient_clip_val) would clip all groups as one: use AdamW(clip=...) of each group."
            )
        for group in optimizer.param_groups:
            if (clip := self.optimizer_settings[group["name"]].clip) is not None:
                nn.utils.clip_grad_norm_(group["params"], clip)
