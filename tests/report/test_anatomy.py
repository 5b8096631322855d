"""What the report on the anatomy of safety has of its own."""

import dataclasses

import pytest
from pages import Page
from runs import new_run, rate, row, sample

from jaxsafe.model.layers import LayerRange
from jaxsafe.records.anatomy import Details, Gap, Inside, Overlap, RefusalDirection, RoleCount
from jaxsafe.records.attack import LayerScan
from jaxsafe.records.brittleness import About
from jaxsafe.report.anatomy import agreement
from jaxsafe.report.write import render

GAP = Gap(
    (0.9, 0.8, 0.7), (0.9, 0.7, 0.6), (0.9, 0.5, 0.3), (0.0, 12.0, 13.0), (-1.0, 10.0, 11.0), (1.0, 14.0, 15.0),
    (60, 50), 500, LayerRange(1, 2),
)  # fmt: skip
OVERLAPS = (
    Overlap(
        "weights",
        "units",
        "Jaccard index",
        (0.1, 0.02, None),
        (0.02, 0.02, None),
        (0.01, 0.01, None),
        (0.03, 0.03, None),
        19,
    ),
    Overlap(
        "ranks of o", "direction", "captured energy", (0.0, 0.5, 0.01), (0.02,) * 3, (0.001,) * 3, (0.08,) * 3, 0, True
    ),
)
DETAILS = Details(
    {"safety": 32, "utility": 31},
    (RoleCount("redundant", 0, 3, 0.05, (1, 1, 1)), RoleCount("safety", 1, 5, 0.1, (2, 4, 0))),
    GAP,
    None,
    LayerRange(1, 2),
    RefusalDirection(1, 0, -2.0, 1.5, 0.04, True),
    OVERLAPS,
    (Inside("weights", 0.4, 0.333, 0.5),),
)


def run_of(details=DETAILS):
    def rates(asr):
        return {"asr_scans/vanilla": rate(asr), "broken/vanilla": rate(0.0), "refusal_scans/plain/safe": rate(0.1)}

    control = "random for safety units"
    table = [
        row("dense", rates(0.05), about=About("dense")),
        row("safety units", rates(0.5), about=About("safety units", sparsity=0.01), baseline="dense", control=control),
        row(control, rates(0.06), about=About("random units", True, sparsity=0.01), baseline="dense"),
    ]
    return new_run("anatomy", table, details)


def test_the_page_says_which_units_layers_and_pairs():
    text, figures = render(run_of(), [sample("dense"), sample("safety units", "Take a pick.", False)])
    page = Page(text)
    assert [figure.name for figure in figures][-4:] == ["perplexity", "roles", "gap", "agreement"]
    headings = page.texts("h2")
    assert headings[0] == "What is lost without each part"
    assert {"What units are for", "Which layers tell malicious prompts apart", "How far attributions agree"} <= {
        *headings
    }
    said = " ".join(page.texts("p"))
    assert "first levels off in layers 1." in said and "The rule that reads this off the curve is ours" in said
    assert "Layers were not scaled" in said and "no candidate is within" not in said
    rows = page.texts("tr")
    assert any(r.startswith("safety 1 5 10.00%") for r in rows)
    assert any(r.startswith("weights · units Jaccard index 0.06 0.02 1 of 2 0 of 2") for r in rows)
    assert any(r.startswith("weights 40.0% 33.3% 50%") for r in rows)
    assert "weights · units 0.06 by 0.02" in figures[-1].inline


def test_no_gap_no_allowed_direction_and_a_scan_are_said():
    changed = dataclasses.replace(
        DETAILS,
        gap=dataclasses.replace(GAP, layers=None),
        direction=dataclasses.replace(DETAILS.direction, allowed=False),
        scan=LayerScan(0, 2, 7, (), ()),
        layers=LayerRange(0, 2),
    )
    said = " ".join(Page(render(run_of(changed), [])[0]).texts("p"))
    assert "No gap opens" in said and "no candidate is within the published limits" in said
    assert "Scaling finds layers 0 to 1: 7 prompts are refused" in said


def test_layers_outside_what_is_random_are_counted():
    first, second = map(agreement, OVERLAPS)
    assert (first.value, first.chance, first.above, first.below, first.layers) == (pytest.approx(0.06), 0.02, 1, 0, 2)
    assert (second.above, second.below, second.layers) == (1, 1, 3)
