"""What the report of a run of remedies for over-refusal has of its own: the trade-off, gates, what each was set to."""

from jaxsafe.records.overrefusal import Details
from jaxsafe.records.run import Run, from_json
from jaxsafe.report import plots_overrefusal as plots
from jaxsafe.report.own import Own
from jaxsafe.report.sections import controls_of
from jaxsafe.report.style import Drawing


def own(run: Run) -> Own:
    """The sections of the run; its headline is about the remedy that the run names first. Raises ValueError where its
    details are none."""
    details = from_json(run.details, Details)
    first = details.remedies[0].name if details.remedies else None
    figures: list[Drawing] = []
    controls = controls_of(run)
    points = [(row, row.group in controls) for row in run.table]
    if any(plots.pooled(row, run.judge.name, side) for row, _ in points for side in ("safe", "harmful")):
        figures.append(plots.tradeoff("tradeoff", points, run.judge.name))
    if details.mended:
        figures.append(plots.candidates("candidates", details.mended.tried, details.mended.chosen))
    contents = {"remedies": "Remedies"} | ({"gates": "Gates"} if details.gates else {})
    return Own(
        title="Over-refusal of",
        kicker="Remedies for over-refusal, side by side",
        best=next((row for row in run.table if row.group == first), None),
        template="overrefusal.html.j2",
        contents=contents | ({"mending": "Mending"} if details.mended else {}),
        figures=figures,
        values={"details": details, "costs": {cost.variant: cost.passes for cost in details.costs}},
        facts=[("Perplexity of", details.perplexity_text)],
    )
