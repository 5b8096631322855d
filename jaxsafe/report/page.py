"""What the pages of all reports share: the templates' environment, and how numbers and names are written."""

import base64
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from markupsafe import Markup

from jaxsafe.report import style

Run = Mapping[str, Any]

TEMPLATES = pathlib.Path(__file__).parent / "templates"
IDENTITY = "task jaxsafe git date device model seed judge chat_template_sha256".split()
"""Entries of run.json that say which run it was."""


def page(template: str, scripts: Sequence[str], run: Run, **values: Any) -> str:
    """A template filled in, with the run, its style and its scripts, as HTML text.

    Args:
      template: name of the template, which extends base.html.j2.
      scripts: names of the files whose text becomes the page's one script, the only one that may run.
      run: the content of run.json.
      values: what else the template names.
    """
    script = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in scripts)
    return (
        _environment()
        .get_template(template)
        .render(
            run=run,
            identity={key: run[key] for key in IDENTITY if run.get(key) is not None},
            light=style.LIGHT,
            dark=style.DARK,
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            **values,
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "number": number,
        "p_value": p_value,
        "moment": moment,
        "token": visible_token,
        "words": words,
        "flat": flat,
    }
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.tests["measured"] = is_number
    return environment


def is_number(value: object) -> bool:
    """Whether a value is a finite number, not null, absent, NaN or a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(value: Any, digits: int = 1) -> str:
    """0.314 -> "31.4%"; a dash where nothing was measured."""
    return f"{value:.{digits}%}" if is_number(value) else "–"


def number(value: Any, digits: int = 3) -> str:
    """1234.5 -> "1,230"; a dash where nothing was measured."""
    if not is_number(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{float(f'{value:.{digits}g}'):,g}"


def p_value(value: Any) -> str:
    """0.0213 -> "= 0.021"; 1e-9 -> "< 0.001"."""
    if not is_number(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"


def moment(text: Any) -> str:
    """An ISO date as "2025-03-01 12:30 UTC"; any other text as it is."""
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z").strip()
    except (TypeError, ValueError):
        return str(text)


def visible_token(text: Any) -> str:
    """A token with its line breaks and tabs made visible."""
    return str(text).replace("\n", "↵").replace("\t", "⇥")


def words(text: Any) -> str:
    """A name for reading: "figurative_language" -> "figurative language"."""
    return str(text).replace("_", " ")


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as ("a.b", "1") pairs."""
    if isinstance(value, Mapping) and value:
        return [pair for key, item in value.items() for pair in flat(item, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
