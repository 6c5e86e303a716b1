"""From a template to a page that needs nothing else and can load nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from pdlightning.report.palette import style_of_palette

if TYPE_CHECKING:
    from markupsafe import Markup

STYLES = ("page.css",)
SCRIPTS = ("core.js", "scales.js", "lines.js", "heat.js", "tables.js", "examples.js")


def render(template: str, *, payload: dict[str, Any], **values: Any) -> str:
    """A template of this package, filled in. Everything is escaped; only our own style and scripts may run.

    Args:
        payload: what the scripts draw, as plain values.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("pdlightning.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    style, script = assets()
    return environment.get_template(template).render(
        **values,
        style=Markup(style),
        script=Markup(script),
        policy=policy(style, script),
        payload=Markup(as_json(payload)),
    )


def breakable(name: str) -> Markup:
    """A name that a line may end inside of, after a slash or an underscore."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[/_])", name))


@cache
def assets() -> tuple[str, str]:
    """The style sheet and the script."""
    folder = files("pdlightning.report")
    style = style_of_palette() + "".join((folder / name).read_text() for name in STYLES)
    script = '"use strict";\n' + "".join((folder / name).read_text() for name in SCRIPTS)
    return style, script


def policy(style: str, script: str) -> str:
    """Nothing from elsewhere, and of what stands in the page only these two."""
    return (
        f"default-src 'none'; img-src data:; style-src '{digest(style)}'; script-src '{digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def as_json(payload: dict[str, Any]) -> str:
    """JSON that cannot end the element it stands in; a value that is no number is refused."""
    text = json.dumps(payload, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
