"""What the report of a search within a bound has of its own (arXiv 2602.06911): trials, and what the chosen ones do."""

from collections.abc import Mapping

from jaxsafe.records.run import Run, TableRow, from_json
from jaxsafe.records.search import BASE, About, Details, Trial
from jaxsafe.report import plots_search as plots
from jaxsafe.report.own import Own
from jaxsafe.report.page import percent
from jaxsafe.report.sections import broken_words, columns, spoken


def own(run: Run) -> Own:
    """The sections of a search. Raises ValueError where its details or its columns are none."""
    details = from_json(run.details, Details)
    rows = [row for row in run.table if not from_json(row.about, About).validation]
    trials = {BASE: (details.base,)} | {each.sampler: each.trials for each in details.searches}
    best = {each.sampler: trial for each in details.searches for trial in each.trials if trial.name == each.best}
    named = {row.group: row for row in rows}
    return Own(
        title="Bounded search for an attack on",
        kicker="The most harm that fine-tuning does within a bound on the loss of utility",
        best=named.get("best by tpe"),
        headline=headline(details, named),
        template="search.html.j2",
        facts=[("Bound", f"{percent(details.bound, 0)} of {details.utility}"), ("optuna", details.optuna)],
        contents={"trials": "Trials"},
        figures=[plots.bounded("bounded", details.bound, trials, best)],
        values={"details": details, "tried": tried(trials, best)},
        shown=rows,
    )


def tried(trials: Mapping[str, tuple[Trial, ...]], best: Mapping[str, Trial]) -> list[tuple[Trial, bool]]:
    """Every trial with whether it was chosen, most harm first."""
    every = [trial for each in trials.values() for trial in each]
    return [(trial, trial in best.values()) for trial in sorted(every, key=lambda trial: -(trial.harm or 0.0))]


def headline(details: Details, rows: Mapping[str, TableRow]) -> str:
    """The result in a sentence, on held-out prompts: the chosen run, random search, the base attack, and before."""
    name = next((name for row in rows.values() for name in columns([row]).starting("asr_")), None)
    if name is None:
        return ""
    found = [
        f"within {percent(details.bound, 0)} of {details.utility} the search {_reached(rows, 'best by tpe', name)}",
        f"random search {_reached(rows, 'best by random', name)}",
        f"the base attack {_reached(rows, BASE, name)}",
    ]
    before = f" ({spoken(rows['before'].rates.get(name))} before)" if "before" in rows else ""
    return f"On held-out prompts{before} {'; '.join(found)}"


def _reached(rows: Mapping[str, TableRow], group: str, name: str) -> str:
    if group not in rows:
        return "found no run that keeps within it"
    row = rows[group]
    return f"reaches attack success {spoken(row.rates.get(name))}{broken_words(rows.get('before'), row, name)}"
