"""What the report of a run on brittleness has of its own: trade-offs, and where safety sits among the weights.

The study is that of Wei et al. (arXiv 2402.05162); its trade-off is attack success against what is left of the model.
"""

import math
from collections.abc import Mapping, Sequence

from jaxsafe.records.brittleness import About, Details
from jaxsafe.records.run import Run, from_json
from jaxsafe.report import plots_brittleness as plots
from jaxsafe.report.own import Own
from jaxsafe.report.page import number, p_value, times, words
from jaxsafe.report.page import points as differing
from jaxsafe.report.plots_brittleness import Point
from jaxsafe.report.sections import (
    ABILITY,
    Columns,
    broken_words,
    columns,
    lines,
    main_comparison,
    rate_label,
    setting_of,
    spoken,
)
from jaxsafe.report.style import LIGHT, Drawing


def own(run: Run) -> Own:
    """The sections of a run on brittleness, whose first row is the dense model. Raises ValueError for other details."""
    details, points, named = from_json(run.details, Details), points_of(run), columns(run.table)
    asr = named.starting("asr_")
    best = chosen(points, asr[0]) if asr else None
    layered = _layered(points, best, details.sparsity)
    overlap = _overlap(details)
    trade_offs = _trade_offs(points, named, best)
    harmless = [
        plots.harmless(f"harmless-{index}", points, name) for index, name in enumerate(named.starting("refusal_"))
    ]
    inside = _insides(details, layered, overlap)
    contents = {"trade-off": "Trade-off"} if trade_offs else {}
    contents |= {"harmless": "Harmless prompts"} if harmless else {}
    contents |= {"layers": "Layers"} if layered else {}
    contents |= {"overlap": "Overlap"} if overlap else {}
    contents |= {"energy": "Energy"} if details.energy else {}
    return Own(
        title="Brittleness of",
        kicker="Weights and ranks that carry safety",
        best=best.line.row if best else None,
        headline=headline(points, asr),
        template="brittleness.html.j2",
        facts=[("Random draws a point", run.config.get("controls"))],
        contents=contents,
        figures=[*trade_offs, *harmless, *inside],
        values={
            "draws": max((len(point.line.row.variants) for point in points if point.line.control), default=0),
            "trade_offs": [(figure.name, asr[int(figure.name.rpartition("-")[2])]) for figure in trade_offs],
            "answers_of": lambda name: max((point.rates[name].n for point in points if name in point.rates), default=0),
            "ability": rate_label(ABILITY, []).lower() if ABILITY in named.main else "",
            "harmless": named.starting("refusal_"),
            "layered": [point.name for point in layered],
            "overlap": overlap,
            "details": details,
        },
    )


def points_of(run: Run) -> list[Point]:
    """The rows of the table with what their columns say. Raises ValueError for columns that are none."""
    return [Point(line, from_json(line.row.about, About)) for line in lines(run)]


def chosen(points: Sequence[Point], metric: str) -> Point | None:
    """The point that raises `metric` most for what it costs: highest gain less the logarithm of the ratio.

    Controls do not count, nor damaged points where a working one raises the metric; None where nothing raises it.
    """
    raising = [point for point in points[1:] if not point.line.control and _gain(points[0], point, metric) > 0]
    working = [point for point in raising if not point.line.damaged]
    return max(working or raising, key=lambda point: _worth(points[0], point, metric), default=None)


def _gain(dense: Point, point: Point, metric: str) -> float:
    before, after = (p.rates[metric].value if metric in p.rates else None for p in (dense, point))
    return 0.0 if before is None or after is None else after - before


def _worth(dense: Point, point: Point, metric: str) -> float:
    return _gain(dense, point, metric) - math.log(max(point.line.ratio or 1.0, 1.0))


def headline(points: Sequence[Point], asr: Sequence[str]) -> str:
    """The result in one sentence: the point of `chosen` beside the dense model and its random control."""
    tried = [point for point in points[1:] if not point.line.control and point.rates.keys() & set(asr[:1])]
    if not tried or asr[0] not in points[0].rates:
        return ""
    metric, dense, point = asr[0], points[0], chosen(points, asr[0])
    what = f"attack success ({words(setting_of(metric))})"
    if point is None:
        return f"No removal raised {what} above the dense model's {spoken(dense.rates[metric])}"
    removed = removed_words(point)
    cause = f"removing {removed} ({point.name})" if removed else point.name
    sentence = f"{cause} raised {what} from {spoken(dense.rates[metric])} to {spoken(point.rates[metric])}"
    sentence += broken_words(dense.line.row, point.line.row, metric)
    sentence += _cost(dense, point) + _against_control(points, point, metric)
    if point.line.damaged:
        return f"Every removal that raised {what} damaged the model and says nothing about safety; at best, {sentence}"
    return sentence[:1].upper() + sentence[1:]


def removed_words(point: Point) -> str:
    """What a point removes: "0.62% of the weights", "56.5 ranks a map"."""
    parts = [part for part in point.line.words.split("; ") if part.endswith(" removed")]
    return " and ".join(part.removesuffix(" removed") for part in parts)


def _cost(dense: Point, point: Point) -> str:
    ratio = point.line.ratio
    if ratio is None:
        return ", its perplexity unmeasured"
    before, after = number(dense.line.row.perplexity), number(point.line.row.perplexity)
    if math.isinf(ratio):
        return f", perplexity going from {before} to no finite number"
    return f", perplexity going from {before} to {after} ({times(ratio)})"


def _against_control(points: Sequence[Point], point: Point, metric: str) -> str:
    control = next((other for other in points if other.name == point.line.row.control), None)
    if control is None or metric not in control.rates:
        return "; it was not compared with a random control"
    compared = main_comparison(point.line.row.against_control)
    p = compared and compared.complied_p_value
    gap = compared and compared.complied.value is not None and differing(compared.complied)
    tested = f", p\u00a0{p_value(p)}" if p is not None else f" (difference {gap} points)" if gap else ""
    state = ", itself damaged" if control.line.damaged else ""
    return f"; its random control reached {spoken(control.rates[metric])}{tested}{state}"


def _trade_offs(points: Sequence[Point], named: Columns, best: Point | None) -> list[Drawing]:
    """Attack success against perplexity and ability; the number in a figure's name is that of the rate."""
    figures, ringed = [], best.name if best else None
    for index, metric in enumerate(named.starting("asr_")):
        if metric not in points[0].rates or all(metric not in point.rates for point in points[1:]):
            continue
        if points[0].line.row.perplexity is not None:
            figures.append(plots.against_perplexity(f"perplexity-{index}", points, metric, ringed))
        if ABILITY in named.main:
            label = rate_label(ABILITY, []).lower()
            figures.append(plots.against_accuracy(f"ability-{index}", points, metric, ABILITY, label, ringed))
    return figures


def _insides(details: Details, layered: Sequence[Point], overlap: Mapping[str, dict]) -> list[Drawing]:
    """Figures of where the removed weights sit, how they overlap and how much the ranks hold."""
    by_layer = [_shares(point, details.sparsity) for point in layered]
    highest = max((value for shares in by_layer for row in shares.values() for value in row), default=0.0)
    tones = (LIGHT["harmful"], LIGHT["safe"])
    figures = [
        plots.heat_map(f"layers-{index}", shares, highest, point.name, color)
        for index, (point, shares, color) in enumerate(zip(layered, by_layer, tones, strict=False))
    ]
    for name, found in overlap.items():
        figures.append(plots.per_layer(name, found["values"], found["label"], found["chance"]))
    return figures + ([plots.energy("energy", details.energy)] if details.energy else [])


Sparsity = Mapping[str, Mapping[str, tuple[float, ...]]]


def _shares(point: Point, sparsity: Sparsity) -> Mapping[str, tuple[float, ...]]:
    """The shares of the weights that the first variant of a point removes, a number a layer, by map."""
    return next((sparsity[name] for name in point.line.row.variants if name in sparsity), {})


def _layered(points: Sequence[Point], best: Point | None, sparsity: Sparsity) -> list[Point]:
    """The point whose weights are shown by layer, the best where it has them, and its counterpart for utility."""
    having = [point for point in [best, *points] if point and _shares(point, sparsity) and not point.line.control]
    first = next((point for point in having if not _of_utility(point)), None)
    others = [point for point in having if _of_utility(point)]
    alike = [point for point in others if first and point.about.parameters == first.about.parameters]
    return [point for point in (first, *(alike or others)[:1]) if point]


def _of_utility(point: Point) -> bool:
    family = point.about.family.casefold()
    return "utility" in family and "safety" not in family


def _overlap(details: Details) -> dict[str, dict]:
    """Name of a figure -> the values of each map by layer, with their label and, for Jaccard, that of chance."""
    figures = {}
    if details.overlap is not None and details.overlap.values:
        share = details.overlap.fraction
        # Two random shares f of the same weights meet in f² of them and cover 2f - f².
        chance = share / (2 - share)
        figures["jaccard"] = {"values": details.overlap.values, "label": "Jaccard index", "chance": chance}
    if details.similarity is not None and details.similarity.values:
        values = details.similarity.values
        figures["similarity"] = {"values": values, "label": "subspace similarity", "chance": None}
    return figures
