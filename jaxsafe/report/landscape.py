"""What the report of a walk through the safety landscape has of its own: basins, VISAGE, the line to another model."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxsafe.records.landscape import About, Details
from jaxsafe.records.run import Run, TableRow, from_json
from jaxsafe.report import plots_landscape as plots
from jaxsafe.report.own import Own
from jaxsafe.report.page import is_number, percent
from jaxsafe.report.plots_landscape import Names, Plane, Walk
from jaxsafe.report.sections import DAMAGED, columns, spoken
from jaxsafe.report.style import Drawing, array, value_of

LABELS = {"random": "norms of each tensor", "toward": "0: this model, 1: the other one", "as far": "random, as far"}


def own(run: Run) -> Own:
    """The sections of a walk, whose first row is the model itself. Raises ValueError where its details are none."""
    details = from_json(run.details, Details)
    rows = [(row, from_json(row.about, About)) for row in run.table]
    origin, names = run.table[0], names_of(run)
    lines = {kind: walk(rows, kind) for kind in LABELS if any(about.line == kind for _, about in rows)}
    figures: list[Drawing] = []
    if names:
        figures += [plots.curves("basin", lines["random"], names, origin)] if "random" in lines else []
        figures += planes(rows, names, origin)
        if "toward" in lines:
            figures.append(plots.curves("toward", lines["toward"], names, origin, lines.get("as far")))
    drawn = {figure.name for figure in figures}
    contents = {"basin": "Basin"} if details.visage or "basin" in drawn else {}
    contents |= {"plane": "Plane"} if "plane" in drawn else {}
    contents |= {"toward": "Toward"} if "toward" in drawn else {}
    return Own(
        title="Safety landscape of",
        kicker="Safety and capability around a model's weights",
        best=None,
        headline=headline(details, lines, names),
        template="landscape.html.j2",
        facts=[("Random directions", run.config.get("draws") if "random" in lines else None)],
        contents=contents,
        figures=figures,
        values={"details": details, "draws": run.config.get("draws")},
        shown=[row for row, about in rows if about.line != "plane"],
    )


def names_of(run: Run) -> Names | None:
    """The rates of harmful prompts under the first setting, None where no harmful prompt was asked."""
    success = next(iter(columns(run.table).starting("asr_")), None)
    if success is None:
        return None
    _, _, setting = success.partition("/")
    return Names(success.replace("asr_", "unrefused_", 1), success, f"broken/{setting}")


def walk(rows: Sequence[tuple[TableRow, About]], kind: str) -> Walk:
    """The points of a line with the model itself at 0, by their offsets."""
    points = {about.offsets[0]: row for row, about in rows if about.line == kind} | {0.0: rows[0][0]}
    return Walk(LABELS[kind], tuple(sorted(points)), tuple(points[offset] for offset in sorted(points)))


def planes(rows: Sequence[tuple[TableRow, About]], names: Names, origin: TableRow) -> list[Drawing]:
    """What papers count, and compliance, over the plane; none without one."""
    points = {(about.offsets[0], about.offsets[1]): row for row, about in rows if about.line == "plane"}
    if not points:
        return []
    points[0.0, 0.0] = origin
    offsets = tuple(sorted({x for x, _ in points}))
    over = [[points[x, y] for x in offsets] for y in offsets]
    perplexity = np.array([array(row.perplexity for row in line) for line in over])

    def plane(metric: str) -> Plane:
        return Plane(
            offsets, np.array([[value_of(row.rates.get(metric)) for row in line] for line in over]), perplexity
        )

    return [
        plots.contours("plane", plane(names.unrefused), "No refusal seen", origin),
        plots.contours("plane-complied", plane(names.complied), "Compliance", origin),
    ]


def headline(details: Details, lines: Mapping[str, Walk], names: Names | None) -> str:
    """The result in a sentence: the depth of the basin and what lies at its ends, then the line to another model."""
    if names is None:
        return ""
    clauses = []
    paper = next((found for found in details.visage if found.definition == "paper"), None)
    if paper is not None and is_number(paper.value):
        clauses.append(
            f"VISAGE, as the paper defines it, is {depth(paper.value)}{_between(paper.ci_low, paper.ci_high)}"
        )
    if "random" in lines:
        clauses.append(ends(lines["random"], names))
    if "toward" in lines and 1.0 in lines["toward"].offsets:
        clauses.append(reached(details, lines, names))
    sentence = "; ".join(clauses)
    return sentence[:1].upper() + sentence[1:]


def depth(value: float) -> str:
    """VISAGE as papers print it, times 100."""
    return f"{100 * value:.1f}"


def _between(low: float | None, high: float | None) -> str:
    return f" ({depth(low)}–{depth(high)})" if is_number(low) and is_number(high) else ""


def ends(line: Walk, names: Names) -> str:
    """What is left at the ends of a random line, and where the model is damaged before."""
    unrefused, broken = (np.mean(line.values(name)[[0, -1]]) for name in (names.unrefused, names.broken))
    said = f"at offsets of ±{line.offsets[-1]:g} no refusal is seen in {percent(unrefused, 0)} of answers"
    said += f", and {percent(broken, 0)} are broken"
    origin = line.rows[line.offsets.index(0.0)].perplexity
    ratio = line.perplexity / origin if origin else np.full(len(line.offsets), np.nan)
    damaged = [abs(a) for a, times in zip(line.offsets, ratio, strict=True) if not times <= DAMAGED]
    return said + (f"; the model is damaged from ±{min(damaged):g} on" if origin and damaged else "")


def reached(details: Details, lines: Mapping[str, Walk], names: Names) -> str:
    """Attack success at the other model, and at its random control."""
    there = lines["toward"].rows[lines["toward"].offsets.index(1.0)]
    said = f"at {details.other} attack success is {spoken(there.rates.get(names.complied))}"
    control = lines.get("as far")
    if control is None or 1.0 not in control.offsets:
        return f"{said}, without a random control"
    return f"{said}, as far at random {spoken(control.rows[control.offsets.index(1.0)].rates.get(names.complied))}"
