"""The report of fine-tuning attacks: how cheaply safety is undone, and what freezing or rewinding is worth.

The attacks are those of Qi et al. (arXiv 2310.03693), the table is after that of Wei et al. (arXiv 2402.05162).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jaxsafe.report import plots_attack as plots
from jaxsafe.report.brittleness import VERDICTS, answers, verdict
from jaxsafe.report.page import Run, is_number, page, percent

Rows = Sequence[Mapping[str, Any]]


def render(run: Run, samples: Iterable[Mapping[str, Any]]) -> str:
    """The page of a run of fine-tuning attacks as HTML text.

    Args:
      run: the content of run.json (schema 1): `before`, `table` and `cells` of the grid.
      samples: rows of samples.jsonl: cell, set, setting, harmful, prompt, text, refused, suffix, sample.
    """
    groups = grouped(run.get("table") or [])
    starts = {label: _start(point) for label, point in (run.get("before") or {}).items()}
    ids = [f"before {label}" for label in starts] + [cell["id"] for cell in run.get("cells") or []]
    listed = answers(({**row, "point": row.get("cell")} for row in samples), ids)
    figures = _figures(groups)
    return page(
        "attack.html.j2",
        ["report.js", "brittleness.js"],
        run,
        headline=headline(groups, starts),
        starts=starts,
        groups=groups,
        pivot=pivot(groups),
        name_of=plots.name_of,
        points_of=points_of,
        figures={name: Markup(svg) for name, svg in figures.items()},
        answers=listed,
        shown=1 if len(listed["points"]) > 1 else None,
        table=_table(listed),
        verdict=verdict,
        verdicts=VERDICTS,
    )


def grouped(table: Rows) -> list[dict[str, Any]]:
    """The rows of every attack and way of training: {"label", "attack", "tuning", "rows"}."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in table:
        groups.setdefault((str(row["attack"]), str(row["tuning"])), []).append(row)
    return [
        {"label": f"{attack}, {tuning}", "attack": attack, "tuning": tuning, "rows": rows}
        for (attack, tuning), rows in groups.items()
    ]


def pivot(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line a defence with its rate in every group, None where it has none; as table 3 of arXiv 2402.05162."""
    names = dict.fromkeys(row["defence"] for group in groups for row in group["rows"])
    found = [{row["defence"]: row for row in group["rows"]} for group in groups]
    out = []
    for name in names:
        row = next(rows[name] for rows in found if name in rows)
        out.append({**row, "rates": [rows[name]["asr"] if name in rows else None for rows in found]})
    return out


def _start(point: Mapping[str, Any]) -> dict[str, Any]:
    """Rates before the attack: {"asr", "refusal", "perplexity"}."""
    metrics = point.get("metrics") or {}

    def first(start: str) -> Any:
        return next((rate for name, rate in metrics.items() if name.startswith(start)), {})

    return {"asr": first("asr_"), "refusal": first("refusal_"), "perplexity": point.get("perplexity")}


def headline(groups: Sequence[Mapping[str, Any]], starts: Mapping[str, Mapping[str, Any]]) -> str:
    """The result in one sentence: what the first attack does, and the frozen region that prevents most of it."""
    if not groups or not is_number(groups[0]["rows"][0]["asr"].get("value")):
        return ""
    group = groups[0]
    none, rows = group["rows"][0], group["rows"][1:]
    before = (starts.get(group["attack"]) or {}).get("asr") or {}
    came = f"from {_spoken(before)} " if is_number(before.get("value")) else ""
    sentence = f"Fine-tuning ({group['label']}) raised attack success {came}to {_spoken(none['asr'])}"
    kept = [row for row in rows if not row.get("control") and is_number((row.get("against_none") or {}).get("value"))]
    if not kept:
        return sentence
    best = max(kept, key=lambda row: row["against_none"]["value"])
    sentence += f"; of the defences {best['defence']} left {_spoken(best['asr'])}"
    control = best.get("against_control") or {}
    random = next((row for row in rows if row["defence"] == control.get("control")), None)
    if random is None:
        return f"{sentence}, without a random control"
    return f"{sentence}, its random control {_spoken(random['asr'])}"


def _spoken(rate: Mapping[str, Any]) -> str:
    if not is_number(rate.get("ci_low")) or not is_number(rate.get("ci_high")):
        return percent(rate.get("value"), 0)
    return f"{percent(rate['value'], 0)} ({100 * rate['ci_low']:.0f}–{percent(rate['ci_high'], 0)})"


def points_of(rate: Mapping[str, Any] | None) -> str:
    """A difference of rates in points with its interval: "+12 (−3 to +27)"."""
    if not rate or not is_number(rate.get("value")):
        return "–"
    value, low, high = (f"{100 * rate[field]:+.0f}".replace("-", "−") for field in ("value", "ci_low", "ci_high"))
    return f"{value} ({low} to {high})"


def _figures(groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    figures = {}
    for index, group in enumerate(groups):
        none, rows = group["rows"][0], group["rows"][1:]
        regions = dict.fromkeys(row["region"] for row in rows)
        for place, region in enumerate(regions):
            name = f"curves-{index}-{place}"
            figures[name] = plots.curves(name, [none, *(row for row in rows if row["region"] == region)])
        if not regions:
            figures[f"curves-{index}-0"] = plots.curves(f"curves-{index}-0", [none])
        compared = [row for row in rows if is_number((row.get("against_none") or {}).get("value"))]
        if compared:
            figures[f"differences-{index}"] = plots.differences(f"differences-{index}", compared)
    return figures


def _table(listed: Mapping[str, Any]) -> dict[str, Any]:
    """The answers as the page's script reads them: [text, refused] or None, a row a prompt, a column a cell."""
    cells = [[answer and [answer["text"], answer["refused"]] for answer in row["answers"]] for row in listed["rows"]]
    return {"points": listed["points"], "answers": cells}
