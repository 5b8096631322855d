"""The report of a run: `run.json` and `samples.jsonl` in; `report.html`, tables and figures out."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

from jaxsafe.io.atomic import new_file, write_text
from jaxsafe.records.run import Run, Sample, read_run, read_samples
from jaxsafe.report import anatomy, attack, brittleness, jailbreak, landscape, overrefusal, scans, sections, tables
from jaxsafe.report.answers import VERDICTS, judgement, reading, side_by_side, verdict
from jaxsafe.report.own import Own
from jaxsafe.report.page import page, words
from jaxsafe.report.published import beside
from jaxsafe.report.style import Drawing

LISTED = 200
"""So many comparisons are listed on the page; those of a larger run are in tables/comparisons.csv."""


def write_report(folder: str | os.PathLike) -> pathlib.Path:
    """Writes the report of the run in `folder`, each file whole or not at all, report.html last.

    report.html needs no network and no other file. tables/ holds results and comparisons as CSV and LaTeX, figures/
    each figure as SVG and PDF.

    Returns: the path of report.html.
    Raises: FileNotFoundError without a run.json; ValueError for what is no run, no sample or no details of its task.
    """
    folder = pathlib.Path(folder)
    run, samples = read_run(folder), read_samples(folder)
    text, figures = render(run, samples)
    for name, content in tables.files(run).items():
        _write(folder / "tables" / name, content)
    for figure in figures:
        _write(folder / "figures" / f"{figure.name}.svg", figure.svg)
        with new_file(folder / "figures" / f"{figure.name}.pdf") as temporary:
            temporary.write_bytes(figure.pdf())
    _write(folder / "report.html", text)
    return folder / "report.html"


def _write(path: pathlib.Path, text: str) -> None:
    # A lone surrogate in a model's answer cannot be written as UTF-8.
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))


def render(run: Run, samples: Sequence[Sample]) -> tuple[str, list[Drawing]]:
    """The page of a run as HTML text, and its figures. Raises ValueError for details that are not of its task."""
    own = TASKS.get(run.task, _any_task)(run)
    shown = {row.group for row in (run.table if own.shown is None else own.shown)}
    lines = [line for line in sections.lines(run) if line.row.group in shown]
    named, compared = sections.columns([line.row for line in lines]), sections.pairs(run)
    pair_figures = sections.pair_figures(compared)
    outcomes = sections.outcome_figures([line.row for line in lines])
    figures = [*pair_figures, *outcomes, *own.figures]
    comparisons = [row for line in lines for row in (*line.row.against_baseline, *line.row.against_control)]
    baselines = {line.row.baseline for line in lines if line.row.against_baseline}
    text = page(
        own.template,
        run=run,
        own=own,
        **own.values,
        headline=sections.headline(run, own.best) if own.headline is None else own.headline,
        identity=sections.identity(run),
        figures={figure.name: figure for figure in figures},
        lines=lines,
        columns=named,
        broken_rate=sections.broken_rate,
        rate_label=lambda name: sections.rate_label(name, [*named.main, *named.other]),
        notes=sections.notes(named.main),
        published=beside(run),
        damaged_above=sections.DAMAGED,
        main_comparison=sections.main_comparison,
        prompts_words=sections.prompts_words,
        baselines=baselines,
        has_control=any(line.row.against_control for line in lines),
        pairs=compared if pair_figures else [],
        measured_kinds=sections.measured_kinds,
        comparisons=comparisons,
        listed=comparisons[:LISTED],
        answers=side_by_side(run, samples, own.best),
        verdict=verdict,
        verdicts=VERDICTS,
        judgement=judgement,
        reading=reading,
    )
    return text, figures


def _any_task(run: Run) -> Own:
    """A page without sections of its task."""
    return Own(f"{words(run.task).capitalize()} on", "Variants of one model put to one exam", sections.headlined(run))


TASKS: Mapping[str, Callable[[Run], Own]] = {
    "scans": scans.own,
    "overrefusal": overrefusal.own,
    "brittleness": brittleness.own,
    "attack": attack.own,
    "jailbreak": jailbreak.own,
    "anatomy": anatomy.own,
    "landscape": landscape.own,
}
"""Task of a run -> what its page has of its own."""
