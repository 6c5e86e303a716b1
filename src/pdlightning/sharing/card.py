"""The model card of a shared run: README.md with its YAML head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from pdlightning.results import VERDICT, goal_row, number
from pdlightning.sharing.reproduce import command_of

TEMPLATE = "card.md.jinja"
NOT_RECORDED = "not recorded"


def model_card(content: Mapping[str, Any], *, load_by: str) -> str:
    """The card of a decomposition, from what its metadata.json says. `load_by` is what `load_run` takes."""
    import jinja2
    import yaml

    metadata = content["metadata"]
    config, summary, target = metadata["config"], metadata["summary"], metadata["target"]
    environment = metadata.get("environment") or {}  # the first format had none
    base_model = hub_name(target)
    head = {
        "library_name": "pdlightning",
        "tags": ["parameter-decomposition", "interpretability", "pytorch-lightning", config["name"]],
        **({} if base_model is None else {"base_model": base_model}),
    }
    environment_of_templates = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment_of_templates.from_string((files("pdlightning.sharing") / TEMPLATE).read_text())
    return template.render(
        head=yaml.safe_dump(head, sort_keys=False).strip(),
        name=config["name"],
        config=config,
        summary=summary,
        target=target,
        network=short(network_of(config["target"])),
        started_from=config.get("init_from"),
        base_model=base_model,
        weights=target.get("weights") or ("hub" if base_model else "included"),
        sites=metadata["sites"],
        ci_fn=short(config["pd"]["ci_fn"]),
        losses=[loss_row(name, loss) for name, loss in config["pd"]["losses"].items()],
        verdict=VERDICT[summary["solved"]],
        goals=[map(cell, goal_row(name, bounds, summary["metrics"])) for name, bounds in config["goal"].items()],
        metrics=[(cell(name), number(value)) for name, value in summary["metrics"].items()],
        command=command_of(config),
        commit=(environment.get("git") or {}).get("commit", NOT_RECORDED),
        dirty=(environment.get("git") or {}).get("dirty", False),
        versions={k: v for k, v in environment.get("versions", {}).items() if v is not None},
        platform=environment.get("platform", NOT_RECORDED),
        allow=config["allow"],
        load_by=load_by,
    )


def hub_name(target: Mapping[str, Any]) -> str | None:
    """Of the target on the Hugging Face hub; a folder has no revision."""
    source = target.get("loaded_from")
    return None if source is None or source["revision"] is None else source["name_or_path"]


def network_of(target: Mapping[str, Any]) -> Any:
    """What a recipe trains, or the target itself."""
    model = target.get("model")
    return model if isinstance(model, Mapping) and "_target_" in model else target


def short(node: Any) -> str:
    """A node of a config in one line: its class and its settings."""
    if not isinstance(node, Mapping):
        return json.dumps(node)
    arguments = ", ".join(f"{key}={short(value)}" for key, value in node.items() if not key.startswith("_"))
    return f"{node['_target_'].rpartition('.')[2]}({arguments})" if "_target_" in node else f"{{{arguments}}}"


def loss_row(name: str, loss: Mapping[str, Any]) -> tuple[str, str, str]:
    """A loss, its coefficient and its other settings."""
    coeff = loss.get("coeff")  # a loss may have a default
    rest = {key: value for key, value in loss.items() if key != "coeff"}
    return cell(name), "1" if coeff is None else cell(short(coeff)), cell(short(rest))


def cell(text: str) -> str:
    """Text in a table of Markdown."""
    return text.replace("|", "\\|").replace("\n", " ")
