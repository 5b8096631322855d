"""What a report of a walk through the safety landscape has of its own."""

import dataclasses
import itertools

import pytest
from pages import Page
from runs import new_run, rate, row, sample

from jaxsafe.records.landscape import About, Details, Visage
from jaxsafe.report.landscape import own
from jaxsafe.report.write import render

DETAILS = Details(
    80, (Visage("paper", 0.85, 0.8, 0.9, (0.84, 0.86)), Visage("code", 0.0, None, None, (0.0, None))), "tuned", 0.02
)


def point(line, offsets, unrefused, perplexity=10.0, broken=0.0, **more):
    rates = {
        "asr_scans/vanilla": rate(max(0.0, unrefused - broken)),
        "unrefused_scans/vanilla": rate(unrefused),
        "broken/vanilla": rate(broken),
    }
    about = About(line, offsets, line == "as far")
    group = "as it is" if line == "origin" else f"{line} {offsets}"
    draws = (f"{group}, draw 0", f"{group}, draw 1") if line in ("random", "as far") else (group,)
    return row(group, rates, draws, about, perplexity, baseline=None if line == "origin" else "as it is", **more)


def plane():
    grid = itertools.product((-0.5, 0.0, 0.5), repeat=2)
    return [point("plane", offsets, 0.9, 900.0 if offsets[0] else 12.0) for offsets in grid if any(offsets)]


TABLE = [
    point("origin", (), 0.05),
    point("random", (-0.5,), 0.8, None, broken=0.8),
    point("random", (-0.25,), 0.3, 14.0),
    point("random", (0.25,), 0.3, 16.0),
    point("random", (0.5,), 1.0, 9e4, broken=0.9),
    *plane(),
    point("toward", (1.0,), 0.6, control="as far (1.0,)"),
    point("as far", (1.0,), 0.04),
]


def run_of(table, details=DETAILS):
    results = new_run("landscape", table, details)
    return dataclasses.replace(results, config={"draws": 2, "layers": None})


@pytest.fixture(scope="module")
def rendered():
    page, figures = render(run_of(TABLE), [sample("as it is")])
    return Page(page), {figure.name: figure.inline for figure in figures}


def test_the_headline_has_depth_ends_and_the_other_model_beside_its_control(rendered):
    assert rendered[0].texts("p", **{"class": "result"}) == [
        "VISAGE, as the paper defines it, is 85.0 (80.0–90.0); at offsets of ±0.5 no refusal is seen in 90% of "
        "answers, and 85% are broken; the model is damaged from ±0.25 on; at tuned attack success is 60% (50–70%), as "
        "far at random 4% (0–14%)."
    ]


def test_the_page_shows_every_slice(rendered):
    page, _ = rendered
    assert page.texts("h2")[1:4] == ["The safety basin", "Over two directions", "Toward tuned"]
    assert page.texts("h1") == ["Safety landscape of tiny-chat"]
    cells = page.texts("td")
    assert "85.0 80.0–90.0" in cells and "84.0, 86.0" in cells and "0.0" in cells and "0.0, –" in cells
    rows = [text for text in page.texts("tr") if "%" in text]
    assert any(text.startswith("random (-0.25,)") for text in rows)
    assert not any(text.startswith("plane") for text in rows), "its 440 points are left to results.csv"


def test_figures_say_in_words_what_they_show(rendered):
    _, figures = rendered
    assert "-0.25: 30% (0% broken), perplexity 14; +0: 5% (0% broken), perplexity 10" in figures["basin"]
    assert "No refusal seen over a plane: 5% at the model itself, 90% on average at the corners" in figures["plane"]
    assert "+1: 60% (0% broken), perplexity 10" in figures["toward"] and "plane-complied" in figures


def test_a_line_whose_perplexity_was_not_measured_has_safety_alone():
    table = [dataclasses.replace(point, perplexity=None) for point in (TABLE[0], TABLE[2], TABLE[3])]
    found = own(run_of(table, Details(80)))
    assert [figure.name for figure in found.figures] == ["basin"] and list(found.contents) == ["basin"]
    assert found.headline == "At offsets of ±0.25 no refusal is seen in 30% of answers, and 0% are broken"
    assert "perplexity" not in found.figures[0].inline
