"""How the pages of all reports are filled in, and how numbers and names are written."""

import base64
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeGuard

import jinja2
from markupsafe import Markup

from jaxsafe.report import style

TEMPLATES = pathlib.Path(__file__).parent / "templates"


def page(template: str, **values: Any) -> str:
    """A template that extends report.html.j2, filled in with its style and the one script that may run, as HTML."""
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template(template)
        .render(
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
        undefined=jinja2.StrictUndefined,
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
        "points": points,
        "times": times,
    }
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.tests["measured"] = is_number
    return environment


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, not None, NaN or a boolean."""
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


def points(difference: Any) -> str:
    """A difference of shares in points with its interval: "+12 (−3 to +27)"; a dash where there is none."""
    if difference is None or not is_number(difference.value):
        return "–"
    ends = (difference.value, difference.ci_low, difference.ci_high)
    value, low, high = (f"{100 * end:+.0f}".replace("-", "−") for end in ends)
    return f"{value} ({low} to {high})"


def times(ratio: float) -> str:
    """A ratio in words: 1.089 -> "+8.9%", 8.53 -> "8.53 times"."""
    return f"{100 * (ratio - 1):+.1f}%" if ratio < 2 else f"{number(ratio)} times"


def moment(text: str) -> str:
    """An ISO date as "2025-03-01 12:30 UTC"; any other text as it is."""
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return text


def visible_token(text: str) -> str:
    """A token with its line breaks and tabs made visible."""
    return text.replace("\n", "↵").replace("\t", "⇥")


def words(text: str) -> str:
    """A name for reading: "figurative_language" -> "figurative language"."""
    return text.replace("_", " ")


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as ("a.b", "1") pairs."""
    if isinstance(value, Mapping) and value:
        return [pair for key, item in value.items() for pair in flat(item, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
