"""An intervention as an ordinary model: a copy of the target with other weights, in memory or on disk."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pdlightning.editing.interventions import Intervention
from pdlightning.modules.site import PRE_IDENTITY, Block, PreIdentity, Site, StandIn, site_kind
from pdlightning.storage import METADATA, StorageError, atomic_folder, load_decomposition, save_decomposition


class ExportError(RuntimeError):
    """An exported model does not compute what it should, or a file cannot hold it."""


class Inserted(StandIn):
    """A module behind a linear map of its first argument: the export of an edited identity."""

    def __init__(self, *, pre_identity: nn.Linear, module: nn.Module):
        super().__init__()
        self.pre_identity = pre_identity
        self.module = module

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Any:
        return self.module(self.pre_identity(x), *args, **kwargs)


@torch.no_grad()
def export(intervention: Intervention, batch: Any, *, path: str | Path | None = None) -> nn.Module:
    """A copy of the target with no site in it, whose weights do what the intervention does.

    Its class, biases, dtypes and all else are the target's, and like the target it is frozen. What may differ:

    - Weights that are shared come apart where an edit needs it; a layer that has no weight of its own, such as the head
      of a tied toy, becomes an `nn.Linear`. A transformers config then says `tie_word_embeddings = False`.
    - An edited identity in front of an nn.Linear or a Conv1D goes into that one's weight, W M. In front of any other
      module there comes a linear map M without bias (`Inserted`).

    It takes the memory of one more target. With `path`, a transformers model is written by its `save_pretrained` and
    read back to be compared, one more; any other as safetensors and JSON, for `load_exported`.

    Args:
        intervention: what to export; the same at all positions, and not open.
        batch: what the copy is compared on, with the target inside the intervention.
        path: a new folder, which is written whole or not at all.

    Raises:
        ValueError: the intervention differs from one position to another.
        StorageError: there is something at `path` already, or it cannot be written.
        ExportError: the outputs differ, by more than half of the digits of their type; or `save_pretrained` cannot
            hold the model.
    """
    model = intervention.model
    if model.current.edited is not None:
        raise RuntimeError("An intervention is open, and would change what is compared: leave the `with` block first.")
    if path is not None and Path(path).exists():
        raise StorageError(f"{Path(path).absolute()} exists already: give another path, or remove it first.")
    weights = {site: intervention.weight(site) for site in intervention.edits}
    with intervention:
        wanted = model.output(model.run_batch(model.target, batch))

    def check(network: nn.Module, name: str) -> None:
        _check_same(wanted, model.output(model.run_batch(network, batch)), network, name)

    exported = plain_copy(model.target)
    changes = _put(exported, weights)
    check(exported, "the exported model")
    if path is not None and _is_pretrained(exported):
        if changes["inserted"]:
            raise ExportError(
                f"from_pretrained would not build the linear map in front of {', '.join(changes['inserted'])}: export"
                " without path, or without an edit of these identities."
            )
        with atomic_folder(path) as folder:
            exported.save_pretrained(folder)  # type: ignore[operator]
            check(_read_pretrained(exported, folder), f"what from_pretrained makes of {path}")
    elif path is not None:
        save_decomposition(path, exported.state_dict(), {"class": _class_of(exported), **changes})
    return exported


def load_exported(path: str | Path, *, like: nn.Module) -> nn.Module:
    """The model that `export` wrote, frozen. A transformers model is read by its own `from_pretrained`.

    Args:
        path: the folder.
        like: a network of the same class and sizes, such as the target, with sites in it or without; it is copied.

    Raises:
        StorageError: the folder is damaged, or holds a model of another class or of other sizes.
    """
    if not (Path(path) / METADATA).is_file():
        raise StorageError(f"{path} holds no exported model: there is no {Path(path).absolute() / METADATA}.")
    tensors, metadata = load_decomposition(path)
    if "class" not in metadata:
        raise StorageError(f"{path} holds no exported model. A whole run is read by load_run.")
    if metadata["class"] != _class_of(like):
        raise StorageError(f"{path} holds a {metadata['class']}, and `like` is a {_class_of(like)}: give one of those.")
    loaded = plain_copy(like)
    try:
        for name in metadata["apart"]:
            _take_apart(loaded, name)
        for name, width in metadata["inserted"].items():
            _insert(loaded, name, torch.empty(width, width))
        loaded.load_state_dict(tensors, assign=True)
    except (AttributeError, KeyError, RuntimeError) as error:
        raise StorageError(f"{path} does not fit `like`, a {_class_of(like)} of other sizes: {error}") from error
    return loaded.requires_grad_(False)


def plain_copy(target: nn.Module) -> nn.Module:
    """A deep copy of a target without the sites in it. The target stays as it is; what it shares the copy shares."""
    memo: dict[int, Any] = {}
    for module in reversed(list(target.modules())):  # from the innermost outwards
        if isinstance(module, Site | PreIdentity | Block):
            memo[id(module)] = copy.deepcopy(module.module, memo)
    return copy.deepcopy(target, memo)


def _put(network: nn.Module, weights: Mapping[str, Float[Tensor, "d_out d_in"]]) -> dict[str, Any]:
    """Give the places of sites these weights; the names of what came apart, and name -> width of the maps in front."""
    own = {name: weight for name, weight in weights.items() if not name.endswith(PRE_IDENTITY)}
    inserted: dict[str, Tensor] = {}
    for site, M in weights.items():
        name = site.removesuffix(PRE_IDENTITY)
        if name == site:
            continue
        if site_kind(module := network.get_submodule(name)) in ("linear", "conv1d"):
            own[name] = (own[name] if name in own else _in_linear_layout(module).to(M.dtype)) @ M
        else:
            inserted[name] = M
    apart = [*own, *_reading_from(network, own)]
    for name in apart:
        _take_apart(network, name)
    for name, weight in own.items():
        module = network.get_submodule(name)
        stored = weight if site_kind(module) == "linear" else weight.T
        module.weight = _frozen(stored.to(_in_linear_layout(module).dtype))
    innermost_first = sorted(inserted, key=lambda name: -name.count("."))
    for name in innermost_first:
        _insert(network, name, inserted[name])
    if _is_pretrained(network):
        _untie_config(network)
    return {"apart": apart, "inserted": {name: len(inserted[name]) for name in innermost_first}}


def _reading_from(network: nn.Module, names: Iterable[str]) -> list[str]:
    """Modules beside these that have no weight of their own, and read that of one of these when they run."""
    read = {_storage(module) for name in names if _has_weight(module := network.get_submodule(name))}
    modules = network.named_modules(remove_duplicate=False)
    tied = [name for name, m in modules if site_kind(m) is not None and not _has_weight(m) and _storage(m) in read]
    return [name for name in tied if name not in set(names)]


def _take_apart(network: nn.Module, name: str) -> None:
    """In this place a module that no other place, and no other module, reads its weight from."""
    module = network.get_submodule(name)
    if _has_weight(module):
        new = copy.copy(module)
        new.__dict__.update({key: copy.copy(x) for key, x in module.__dict__.items() if isinstance(x, dict)})
    elif site_kind(module) == "linear":
        weight = _in_linear_layout(module)
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").train(module.training)
        new.weight, new.bias = _frozen(weight), module.bias  # type: ignore[assignment]
    else:
        raise ExportError(f"{name}, a {type(module).__name__}, has no weight of its own that could be replaced.")
    network.set_submodule(name, new)


def _insert(network: nn.Module, name: str, M: Float[Tensor, "d d"]) -> None:
    linear = nn.Linear(*M.shape, bias=False, device="meta")
    linear.weight = _frozen(M)
    network.set_submodule(name, Inserted(pre_identity=linear, module=network.get_submodule(name)))


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)


def _has_weight(module: nn.Module) -> bool:
    return "weight" in module._parameters


def _in_linear_layout(module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight if site_kind(module) == "linear" else weight.T


def _storage(module: nn.Module) -> int:
    return _in_linear_layout(module).untyped_storage().data_ptr()


def _class_of(network: nn.Module) -> str:
    return f"{type(network).__module__}.{type(network).__qualname__}"


def _is_pretrained(network: nn.Module) -> bool:
    transformers = sys.modules.get("transformers.modeling_utils")  # no model of it exists before it is imported
    return transformers is not None and isinstance(network, transformers.PreTrainedModel)


def _untie_config(network: Any) -> None:
    """What is no longer one weight must not be tied again by whoever loads the model."""
    tied = getattr(network, "all_tied_weights_keys", None)  # transformers 5 keeps what its config says
    pairs = tied.items() if tied else ()
    embed, head = network.get_input_embeddings(), network.get_output_embeddings()
    apart = head is not None and head.weight is not embed.weight
    if apart or any(network.get_parameter(a) is not network.get_parameter(b) for a, b in pairs):
        for config in {id(c): c for c in (network.config, network.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        if tied:
            network.all_tied_weights_keys = network.get_expanded_tied_weights_keys(all_submodels=True)


def _read_pretrained(exported: Any, folder: Path) -> nn.Module:
    attention = exported.config._attn_implementation
    read = type(exported).from_pretrained(folder, dtype=exported.dtype, attn_implementation=attention)
    return read.to(exported.device).eval()


def _check_same(wanted: Tensor, got: Tensor, network: nn.Module, name: str) -> None:
    dtypes = {wanted.dtype, *(p.dtype for p in network.parameters() if p.is_floating_point())}
    tolerance = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    largest, scale = (float(x.abs().max()) for x in (got.double() - wanted.double(), wanted.double()))
    if not largest <= tolerance * scale:
        raise ExportError(
            f"On this batch, {name} differs from the masked forward by up to {largest:.3g} where outputs reach"
            f" {scale:.3g}, more than the {tolerance:.1g} of it that rounding explains. Does the code of the target"
            " read the weight of an edited site outside its module?"
        )
