"""A paper's numbers beside those of a run: differences, intervals, and what was not measured."""

import csv
import dataclasses
import io

import pytest
from pages import Page
from runs import BEST, brittleness_run, other_run, rate

from jaxsafe.records.run import PublishedRate, PublishedTable, Rate, from_json, plain
from jaxsafe.report import tables
from jaxsafe.report.published import Beside, beside
from jaxsafe.report.write import render

VANILLA = "asr_scans/vanilla"  # 0.62 [0.52, 0.72] at BEST


def held_against(*rates, tasks=("boolq",), run=None):
    table = PublishedTable("a paper, table 1", tuple(PublishedRate(*each) for each in rates), tasks)
    return dataclasses.replace(run or brittleness_run(), published=(table,))


@pytest.mark.parametrize(
    ("value", "within"), [(0.52, True), (0.72, True), (0.6, True), (0.519, False), (0.721, False), (0.0, False)]
)
def test_a_value_is_within_an_interval_with_its_ends(value, within):
    ours = Rate(0.62, 0.52, 0.72, 100)
    found = Beside("a paper", PublishedRate(BEST, VANILLA, value), ours)
    assert found.within is within
    assert found.difference == pytest.approx(0.62 - value)


def test_what_was_not_measured_is_neither_within_nor_outside():
    run = held_against((BEST, "asr_scans/suffix", 0.9), ("set difference q=0.3 p=0.3", VANILLA, 0.9))
    assert [(row.ours, row.difference, row.within) for row in beside(run)] == [(None, None, None)] * 2
    nothing = Beside("a paper", PublishedRate(BEST, VANILLA, 0.1), Rate(None, None, None, 0, 40))
    assert (nothing.difference, nothing.within) == (None, None)


@pytest.mark.parametrize(("tasks", "ours"), [(("boolq",), rate(0.44, 600)), (("boolq", "rte"), None), ((), None)])
def test_an_accuracy_is_compared_with_that_of_the_same_tasks_alone(tasks, ours):
    (row,) = beside(held_against((BEST, "zero_shot/mean", 0.5), tasks=tasks))
    assert row.ours == ours


def test_the_page_and_the_table_have_both_numbers():
    rates = (BEST, VANILLA, 0.6), (BEST, "asr_scans/decoding_mean", 0.2), (BEST, "asr_scans/suffix", 0.97)
    run = held_against(*rates)
    page = Page(render(run, ())[0])
    assert "Beside the published values" in page.texts("h2")
    assert page.texts("td", **{"data-label": "Published"}) == ["60.0%", "20.0%", "97.0%"]
    assert page.texts("td", **{"data-label": "Within the interval"}) == ["within", "outside", "not measured"]
    assert page.texts("td", **{"data-label": "Difference, points"})[-3:] == ["+2.0", "+52.0", "–"]
    (said,) = (text for text in page.texts("p") if text.startswith("Of 3 published values"))
    assert said.startswith("Of 3 published values 2 were measured here, and 1 of these lie within the 95% interval")

    rows = list(csv.DictReader(io.StringIO(tables.files(run)["published.csv"])))
    assert [(row["rate"], row["published"], row["within"]) for row in rows] == [
        (VANILLA, "0.6", "True"),
        ("asr_scans/decoding_mean", "0.2", "False"),
        ("asr_scans/suffix", "0.97", ""),
    ]
    assert float(rows[0]["ours.value"]) == 0.62 and rows[0]["group"] == BEST


def test_a_run_that_is_held_against_nothing_has_no_such_section():
    run = other_run()
    assert beside(run) == [] and "published.csv" not in tables.files(run)
    assert 'id="published"' not in render(run, ())[0]


def test_published_tables_survive_the_file():
    run = held_against((BEST, VANILLA, 0.6))
    assert from_json(plain(run), type(run)).published == run.published
