"""Any transformers model as a target: by hub name or folder, frozen, and never downloaded unless asked."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from pdlightning.config import suggest
from pdlightning.data.hub import check_on_hub, may_download, offline_switch
from pdlightning.targets.language.blocks import refuse_unfit

DType = Literal["float64", "float32", "bfloat16", "float16"]
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
SAFE_ATTENTION = ("sdpa", "eager")
"""Attention that keeps no state between calls and takes any floating type, so that a forward can be recomputed."""


def huggingface_model(
    *,
    name_or_path: str,
    dtype: DType,
    revision: str | None = None,
    class_path: str | None = None,
    download: bool = False,
) -> nn.Module:
    """A transformers model to decompose: frozen, in eval mode, without dropout and without a key-value cache.

    Args:
        name_or_path: a folder that `save_pretrained` wrote, or a name on the Hugging Face hub such as
            `openai-community/gpt2`.
        dtype: of its weights.
        revision: of a hub name, where it is required: a commit hash pins the weights, `main` takes what is there on
            the day of the download. A folder has none.
        class_path: class to load, such as `transformers.LlamaForCausalLM`; None: `AutoModelForCausalLM` finds it.
        download: fetch a hub name that is not in the cache of this machine. Otherwise nothing touches the network.

    What it is stands in the attribute `loaded_from` of the model: name_or_path, revision and the commit behind it.

    Raises:
        ValueError: no such folder; not in the cache and not to be downloaded; the hub refuses or cannot be reached;
            a class that cannot load it; weights that are not those of the model.
    """
    model_class = _loaded_class(class_path)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision belongs to a hub name, but {folder} is a folder: drop revision={revision}.")
        model = _load(model_class, str(folder), dtype=dtype, local_files_only=True)
    else:
        revision = _hub_revision(name_or_path, revision)
        model = _load_from_hub(model_class, name_or_path, dtype=dtype, revision=revision, download=download)
    if (attention := model.config._attn_implementation) not in SAFE_ATTENTION:
        raise ValueError(
            f"{name_or_path} asks for the attention {attention!r}, which cannot be recomputed at will: set"
            f" attn_implementation in its config.json to one of {', '.join(SAFE_ATTENTION)}."
        )
    _keep_angles(model)
    model.loaded_from = _loaded_from(name_or_path, revision)
    model.register_forward_pre_hook(_refusal(model), with_kwargs=True)
    return model.eval().requires_grad_(False)


def _loaded_class(class_path: str | None) -> Any:
    if class_path is None:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM
    module_path, _, name = class_path.rpartition(".")
    try:
        module = importlib.import_module(module_path)
    except (ImportError, ValueError) as error:
        raise ValueError(f"class_path: cannot import {module_path!r} for {class_path!r}: {error}.") from error
    if not hasattr(module, name):
        raise ValueError(f"class_path: {module_path!r} has no {name!r}{suggest(name, dir(module)) or '.'}")
    found = getattr(module, name)
    of_models = isinstance(found, type) and (issubclass(found, nn.Module) or hasattr(found, "_model_mapping"))
    if not of_models or not hasattr(found, "from_pretrained"):
        raise ValueError(
            f"class_path: expected a class of models with from_pretrained, such as transformers.GPT2LMHeadModel;"
            f" {class_path} is {found!r:.80}."
        )
    return found


def _hub_revision(name: str, revision: str | None) -> str:
    """The revision of what must be a name on the hub."""
    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"name_or_path: there is no folder {Path(name).expanduser().absolute()}.")
    if revision is None:
        raise ValueError(
            f"revision is missing: {name!r} is no folder here, and a name on the Hugging Face hub needs one. A commit"
            " hash pins the weights; main takes what is there on the day of the download."
        )
    return revision


def _load_from_hub(model_class: Any, name: str, *, dtype: DType, revision: str, download: bool) -> Any:
    """From the cache of this machine, or else, if allowed, from the hub."""
    from huggingface_hub import constants

    online = may_download(download)
    if _cached_commit(name, revision) is not None:
        try:
            return _load(model_class, name, dtype=dtype, revision=revision, local_files_only=True)
        except ValueError:
            if not online:  # else the cache may hold a part of the files only
                raise
    if not online:
        why = f"{offline_switch()} is set: unset it" if download else "download is false: download: true fetches it"
        raise ValueError(
            f"The model {name} at revision {revision} is not in the cache of this machine ({constants.HF_HUB_CACHE}), "
            f"and {why}. {without_network(name, revision)}"
        )
    check_on_hub("model", name, revision, remedy=without_network(name, revision))
    return _load(model_class, name, dtype=dtype, revision=revision, local_files_only=False)


def without_network(name: str, revision: str) -> str:
    return (
        f"Without a network, run `hf download {name} --revision {revision}` on another machine, copy the folder it"
        " prints here, and give its path as name_or_path."
    )


def _load(model_class: Any, source: str, *, dtype: DType, **where: Any) -> Any:
    from transformers import AutoConfig

    config_class = getattr(model_class, "config_class", None) or AutoConfig
    where = {**where, "trust_remote_code": False}  # transformers would ask on the terminal, and wait
    try:
        if config_class is not AutoConfig:
            _check_kind(config_class, source, where)
        config = config_class.from_pretrained(source, **where)
        for name, value in vars(config).items():
            if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
                setattr(config, name, 0.0)
        config.use_cache = False
        model, found = model_class.from_pretrained(
            source, config=config, dtype=getattr(torch, dtype), output_loading_info=True, **where
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"{source} holds no model that {model_class.__name__} can load: {error}") from error
    if wrong := [*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])]:
        raise ValueError(
            f"{source} lacks {len(wrong)} weights of {type(model).__name__} ({', '.join(sorted(wrong)[:5])}), which"
            " would be random: give class_path the class it was saved from."
        )
    return model


def _check_kind(config_class: Any, source: str, where: dict[str, Any]) -> None:
    """A class of another architecture would be built in that one's published size, with random weights."""
    stored = config_class.get_config_dict(source, **where)[0]
    if (kind := stored.get("model_type", config_class.model_type)) != config_class.model_type:
        raise ValueError(f"its config.json says that it is a {kind}, and the class wants a {config_class.model_type}.")


def _loaded_from(name_or_path: str, revision: str | None) -> dict[str, Any]:
    commit = None if revision is None else _cached_commit(name_or_path, revision)
    return {"name_or_path": name_or_path, "revision": revision, "commit": commit}


def _cached_commit(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a hub name stands for in the cache, None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


class KeepsBufferTypes(nn.Module):
    """A module whose buffers move between devices and never change their type."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


def _keep_angles(model: nn.Module) -> None:
    """Rotary frequencies stay float32 under `.to(bfloat16)`: rounded, they would turn late positions wrongly."""
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)) and not any(True for _ in module.parameters()):
            kind = type(module)
            module.__class__ = type(kind.__name__, (KeepsBufferTypes, kind), {})


def _refusal(model: Any) -> Any:
    """A forward hook that says what is wrong with tokens the model cannot take; some models compute nonsense."""
    n_ctx = getattr(model.config, "max_position_embeddings", None)
    if n_ctx is None:  # without positions there is no longest sequence
        n_ctx = 2**63 - 1
    return partial(_refuse, n_ctx=n_ctx, vocab_size=model.get_input_embeddings().num_embeddings)


def _refuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, n_ctx: int, vocab_size: int) -> None:
    tokens = args[0] if args else kwargs.get("input_ids")
    if isinstance(tokens, Tensor):
        refuse_unfit(tokens, n_ctx=n_ctx, vocab_size=vocab_size)
