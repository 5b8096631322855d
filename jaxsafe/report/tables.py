"""The results of a run as CSV, a number a cell, and as LaTeX for a paper."""

import csv
import io
from collections.abc import Mapping, Sequence

from jaxsafe.records.run import Comparison, Difference, Json, Rate, Run, TableRow, to_json
from jaxsafe.report.page import is_number, number, p_value, words
from jaxsafe.report.published import Beside, beside
from jaxsafe.report.sections import columns, rate_label

Cell = str | float | int | None


def files(run: Run) -> dict[str, str]:
    """Name of a file -> its text."""
    published = [_published(row) for row in beside(run)]
    named = {
        "results.csv": _csv([_result(run, row) for row in run.table]),
        "results.tex": results_tex(run),
        "comparisons.csv": _csv([_comparison(*entry) for entry in _compared(run)]),
        "comparisons.tex": comparisons_tex(run),
    }
    return named | ({"published.csv": _csv(published)} if published else {})


def _csv(rows: Sequence[Mapping[str, Cell]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _result(run: Run, row: TableRow) -> dict[str, Cell]:
    """A group of variants: its columns, its numbers, and five cells a rate."""
    cells: dict[str, Cell] = {"group": row.group, "variants": len(row.variants)}
    cells |= {"judge": run.judge.name, "new_tokens": run.new_tokens}
    cells |= {"baseline": row.baseline, "control": row.control}
    cells |= {f"about.{name}": _plain(value) for name, value in row.about.items()}
    cells |= {"perplexity": row.perplexity, "answer_perplexity": row.answer_perplexity, "repetition": row.repetition}
    for name in dict.fromkeys(name for other in run.table for name in other.rates):
        cells |= _rate(name, row.rates.get(name))
    return cells


def _published(row: Beside) -> dict[str, Cell]:
    """A published rate beside ours, None where the run has no such rate."""
    cells: dict[str, Cell] = {"source": row.source, "group": row.published.group, "rate": row.published.rate}
    cells |= {"published": row.published.value, "difference": row.difference, "within": row.within}
    return cells | _rate("ours", row.ours)


def _plain(value: Json) -> Cell:
    return value if value is None or isinstance(value, str | int | float) else to_json(value)


def _rate(name: str, rate: Rate | Difference | None) -> dict[str, Cell]:
    fields = ("value", "ci_low", "ci_high") if isinstance(rate, Difference) else Rate.__dataclass_fields__
    return {f"{name}.{field}": getattr(rate, field, None) for field in fields}


def _compared(run: Run) -> list[tuple[str, str, Comparison]]:
    """Every comparison of the run: the group, what it is held against, the comparison."""
    return [
        (row.group, role, compared)
        for row in run.table
        for role, found in (("baseline", row.against_baseline), ("control", row.against_control))
        for compared in found
    ]


def _comparison(group: str, role: str, row: Comparison) -> dict[str, Cell]:
    cells: dict[str, Cell] = {"group": group, "against": role, "first": row.first, "second": row.second}
    cells |= {"label": row.label, "set": row.set, "harmful": row.harmful}
    cells |= _rate("first_rate", row.first_rate) | _rate("second_rate", row.second_rate)
    cells |= _rate("difference", row.difference)
    cells |= _rate("complied", row.complied) | {"complied.p_value": row.complied_p_value}
    cells |= _rate("first_broken", row.first_broken) | _rate("second_broken", row.second_broken)
    cells |= {"p_value": row.p_value, "n": row.n, "n_unscored": row.n_unscored}
    return cells | {"stopped_refusing": row.stopped_refusing, "started_refusing": row.started_refusing}


def results_tex(run: Run) -> str:
    """A row a group: rates in per cent with intervals, perplexities, repetition, and of how many seeds or draws."""
    names = columns(run.table).main
    first = f"Variant (judge {run.judge.name}, {run.new_tokens} new tokens)"
    heads = [first, *(rate_label(name, names) for name in names), "Perplexity", "of answers", "Repeated", "Seeds"]
    rows = [
        [row.group]
        + [_percent(row.rates.get(name)) for name in names]
        + [number(row.perplexity), number(row.answer_perplexity), _share(row.repetition), str(len(row.variants))]
        for row in run.table
    ]
    return _tex(heads, rows)


def comparisons_tex(run: Run) -> str:
    """A row a comparison: both rates in per cent with intervals, the difference in points, McNemar's test."""
    heads = ["First", "Second", "Prompts", "Refused, first", "Refused, second", "Difference", "p", "n"]
    rows = [
        [
            row.first,
            row.second,
            row.label,
            _percent(row.first_rate),
            _percent(row.second_rate),
            _percent(row.difference),
            p_value(row.p_value).removeprefix("= "),
            str(row.n),
        ]
        for _, _, row in _compared(run)
    ]
    return _tex(heads, rows)


def _share(value: float | None) -> str:
    return f"{100 * value:.1f}" if is_number(value) else "–"


def _percent(rate: Rate | Difference | None) -> str:
    if rate is None or rate.value is None:
        return "–"
    return f"{_share(rate.value)} [{_share(rate.ci_low)}, {_share(rate.ci_high)}]"


def _tex(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", "\\hline", _tex_row(heads), "\\hline"]
    return "\n".join([*lines, *map(_tex_row, rows), "\\hline", "\\end{tabular}", ""])


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(_tex_text(cell) for cell in cells) + r" \\"


_ESCAPES = str.maketrans(
    {
        **{c: f"\\{c}" for c in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "–": "--",
        "−": "--",
        "[": "{[}",
    }
)


def _tex_text(text: str) -> str:
    """Text of unknown origin on one line, as LaTeX prints it."""
    return "".join(c if c.isprintable() else " " for c in words(text)).translate(_ESCAPES)
