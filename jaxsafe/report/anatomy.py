"""What the report of a run on the anatomy of safety has of its own: units, layers, and how far attributions agree."""

import dataclasses
from collections.abc import Sequence

from jaxsafe.records.anatomy import Details, Overlap
from jaxsafe.records.run import Run, from_json
from jaxsafe.report import brittleness, plots_anatomy, plots_brittleness
from jaxsafe.report.own import Own
from jaxsafe.report.sections import columns
from jaxsafe.report.style import Drawing


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A pair of attributions over all layers that have both.

    value, chance: means over layers; above, below: in how many layers it lies outside of what random parts reach.
    """

    pair: str
    measure: str
    value: float | None
    chance: float | None
    above: int
    below: int
    layers: int


def own(run: Run) -> Own:
    """The sections of the run, whose first row is the dense model. Raises ValueError for other details."""
    details, points = from_json(run.details, Details), brittleness.points_of(run)
    figures: list[Drawing] = []
    metric = next(iter(columns(run.table).starting("asr_")), None)
    if metric and metric in points[0].rates and points[0].line.row.perplexity is not None:
        figures.append(plots_brittleness.against_perplexity("perplexity", points, metric))
    layers = details.layers
    figures += [plots_anatomy.roles("roles", details.roles), plots_anatomy.gap("gap", details.gap, layers)]
    figures.append(plots_anatomy.agreement("agreement", details.overlaps, layers))
    return Own(
        title="Anatomy of the safety of",
        kicker="Units, layers, weights, ranks and direction",
        best=next((row for row in run.table if row.group == "safety units"), run.table[-1]),
        template="anatomy.html.j2",
        contents={"units": "Units", "layers": "Layers", "agreement": "Agreement"},
        figures=figures,
        values={
            "details": details,
            "metric": metric,
            "agreements": [agreement(each) for each in details.overlaps],
            "draws": max((each.draws for each in details.overlaps), default=0),
        },
        facts=[("Random draws a variant", run.config.get("controls"))],
    )


def agreement(overlap: Overlap) -> Agreement:
    """An overlap in one line."""
    rows = [
        (value, chance, low, high)
        for value, chance, low, high in zip(overlap.values, overlap.chance, overlap.low, overlap.high, strict=True)
        if value is not None and chance is not None and low is not None and high is not None
    ]
    pair = plots_anatomy.pair_name(overlap)
    above = sum(value > high for value, _, _, high in rows)
    below = sum(value < low for value, _, low, _ in rows)
    values, chances = ([row[place] for row in rows] for place in (0, 1))
    return Agreement(pair, overlap.measure, _mean(values), _mean(chances), above, below, len(rows))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
