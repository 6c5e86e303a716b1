"""Formulas of the site: a fenced block `math` becomes MathML while it is built, so that a browser needs no script."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    fence = {"name": "math", "class": "math", "format": as_mathml}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def as_mathml(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="formula">{convert(source, display="block")}</div>'
