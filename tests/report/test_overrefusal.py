"""What a report of remedies for over-refusal has of its own."""

import pytest
from pages import Page
from runs import compared, new_run, rate, row, sample, scans_rates

from jaxsafe.intervals import wilson
from jaxsafe.records.overrefusal import Ceiling, Cost, Details, GateReport, Mended, Remedy, SetShare, Tried
from jaxsafe.report.plots_overrefusal import pooled
from jaxsafe.report.write import render

GATE = GateReport(
    "logistic regression", 0.94, -0.64, (-1.0, -0.4), 0.05, (SetShare("lookalike", False, rate(0.68, 120)),)
)
TRIED = (
    Tried("away 0.03 at end", (True, False, True), (0.4, 0.9, None), 0),
    Tried("clamp", (False,) * 3, (None,) * 3, 1),
)
DETAILS = Details(
    (GATE,),
    (
        Remedy("mend", "ours", "away 0.03", "logistic regression", None, 0.09),
        Remedy("ablation", "arXiv 2406.11717", "block 9"),
    ),
    (Cost("as it is", 1.0), Cost("mend", 1.31)),
    "built-in prose",
    Mended(TRIED, ("away 0.03 at end",), 0.46),
    (Ceiling("lookalike", False, rate(0.7), rate(0.58), rate(0.22)),),
)


def run_of(details=DETAILS):
    changes = (
        compared("as it is", "mend", (0.98, 0.96), p_value=0.5),
        compared(
            "as it is",
            "mend",
            (0.6, 0.2),
            label="lookalike (safe)",
            set="lookalike",
            harmful=False,
            p_value=1e-6,
            n=120,
        ),
    )
    table = [
        row("as it is", scans_rates(0.6, 0.98)),
        row("mend", scans_rates(0.2, 0.96), baseline="as it is", against_baseline=changes, control="mend, random"),
        row("mend, random", scans_rates(0.6, 0.98), baseline="as it is", about={"control": True}),
        row("ablation", scans_rates(0.0, 0.0), baseline="as it is"),
    ]
    return new_run("overrefusal", table, details)


def page_of(details=DETAILS):
    return Page(render(run_of(details), [sample("as it is"), sample("mend", "Use a pick.", False)])[0])


def test_the_page_says_what_was_mended_and_at_what_price():
    page = page_of()
    assert page.texts("h2")[2:5] == [
        "What each remedy is",
        "Which prompts are taken for safe",
        "How refusals are answered again",
    ]
    (result,) = page.texts("p", **{"class": "result"})
    assert "lookalike prompts fell from 60% to 20%" in result and "harmful prompts 98% → 96%" in result
    text = " ".join(page.texts("td"))
    assert "1.31" in text and "0.09" in text and "gate: logistic regression" in text and "gate: none" in text


def test_figures_say_in_words_what_they_show():
    figures = {figure.name: figure for figure in render(run_of(), [])[1]}
    assert "mend: 20% of safe, 96% of harmful prompts refused" in figures["tradeoff"].inline
    assert "away 0.03 at end 67%; clamp 0%; chosen: away 0.03 at end" in figures["candidates"].inline


def test_refusals_are_pooled_over_sets():
    rates = {
        "refusal_scans/a/safe": rate(0.5, 100),
        "refusal_scans/b/safe": rate(0.0, 300),
        "refusal_scans/c/harmful": rate(1.0, 9),
    }
    found = pooled(row("as it is", rates), "scans", "safe")
    assert (found.value, found.n) == (0.125, 400)
    assert (found.ci_low, found.ci_high) == wilson(0.125, 400)
    assert pooled(row("as it is", {}), "scans", "safe") is None


def test_a_run_without_mending_or_gates_has_no_such_sections():
    page = page_of(Details((), DETAILS.remedies, DETAILS.costs, "built-in prose"))
    assert "Which prompts are taken for safe" not in page.texts("h2")
    assert "How refusals are answered again" not in page.texts("h2")


def test_candidates_have_shares_and_nats_of_what_complies():
    assert (TRIED[0].share, TRIED[0].mean_nats) == (pytest.approx(2 / 3), 0.4)
    assert (TRIED[1].share, TRIED[1].mean_nats) == (0, None)
