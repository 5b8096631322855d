"""What a report of a search within a bound has of its own."""

import dataclasses

import pytest
from pages import Page
from runs import new_run, rate, row, sample

from jaxsafe.records.search import BASE, About, Choice, Details, Searched, Trial
from jaxsafe.report.search import own
from jaxsafe.report.write import render

CHOICE = Choice(1e-3, 4, 5, 8, "constant")


def trial(name, harm, loss, **choice):
    return Trial(name, dataclasses.replace(CHOICE, **choice), harm, loss)


TPE = (trial("tpe 0", 0.2, -0.05), trial("tpe 1", 0.6, 0.08, rank=None), trial("tpe 2", 0.9, 4.0))
RANDOM = (trial("random 0", 0.2, -0.05), trial("random 1", None, None))
DETAILS = Details(
    0.1,
    "perplexity",
    trial(BASE, 0.3, 0.0),
    (Searched("tpe", TPE, "tpe 1"), Searched("random", RANDOM, "random 0")),
    "5.0.0",
)


def variant(group, asr, about, broken=0.0, **more):
    rates = {"asr_scans/vanilla": rate(asr), "broken/vanilla": rate(broken)}
    return row(group, rates, about=about, **more)


def chosen(sampler, asr, broken=0.0):
    about = About("best", sampler, sampler == "random")
    control = {"control": "best by random"} if sampler == "tpe" else {}
    return variant(f"best by {sampler}", asr, about, broken, baseline="before", **control)


TABLE = [
    variant("before, validation", 0.01, About("before", validation=True)),
    variant("tpe 1, validation", 0.6, About("trial", "tpe", validation=True), baseline="before, validation"),
    variant("before", 0.02, About("before")),
    variant(BASE, 0.25, About(BASE), baseline="before"),
    chosen("tpe", 0.5, 0.1),
    chosen("random", 0.2),
]


@pytest.fixture(scope="module")
def rendered():
    page, figures = render(new_run("search", TABLE, DETAILS), [sample("before")])
    return Page(page), {figure.name: figure.inline for figure in figures}


def test_the_headline_is_of_held_out_prompts_beside_the_control_and_the_base(rendered):
    assert rendered[0].texts("p", **{"class": "result"}) == [
        "On held-out prompts (2% (0–12%) before) within 10% of perplexity the search reaches attack success 50% "
        "(40–60%), with 10% of answers broken (before 0%); random search reaches attack success 20% (10–30%), with 0% "
        "of answers broken (before 0%); the base attack reaches attack success 25% (15–35%), with 0% of answers broken "
        "(before 0%)."
    ]


def test_the_page_has_every_trial_and_no_validation_among_the_rates(rendered):
    page, figures = rendered
    rows = [text for text in page.texts("tr") if text.startswith(("tpe", "random"))]
    assert rows[0] == "tpe 2 outside the bound 90.0% 400.0% 0.001 4 5 8 constant"
    assert rows[1].startswith("tpe 1 chosen 60.0% 8.0% 0.001 4 5 all weights")
    assert any(text.startswith("random 1 outside the bound – –") for text in rows)
    shown = own(new_run("search", TABLE, DETAILS)).shown
    assert [each.group for each in shown] == ["before", BASE, "best by tpe", "best by random"]
    assert "TPE: 2 of 3 within the bound, most harm 60% at +8%" in figures["bounded"]
    assert "random: 1 of 2 within the bound, most harm 20% at -5%" in figures["bounded"]


def test_a_search_may_find_nothing_within_the_bound():
    searches = (Searched("tpe", TPE[2:], None), Searched("random", RANDOM[1:], None))
    found = own(new_run("search", TABLE[:4], dataclasses.replace(DETAILS, searches=searches)))
    assert found.best is None and "the search found no run that keeps within it; random search found" in found.headline
