"""The answers of a run side by side: those to the same prompt, two variants at a time, within a budget."""

import dataclasses

import pytest
from pages import Page
from runs import BEST, brittleness_run, brittleness_samples, other_run, sample, scans_run, scans_samples

from jaxsafe.report import answers
from jaxsafe.report.answers import LONGEST, VERDICTS, judgement, reading, side_by_side, verdict
from jaxsafe.report.write import render


def table_of(samples, run=None, best=None):
    return side_by_side(run or other_run(), samples, best)


def page_of(run, samples):
    return Page(render(run, samples)[0])


def test_answers_stand_beside_those_to_the_same_prompt():
    samples = [
        sample("plain", "a0"),
        sample("plain", "b0", prompt="b"),
        sample("plain", "a1", sample=1),
        sample("random 0", "b random", prompt="b", refused=None),
        sample("ablated 0", "a ablated", refused=False),
        sample("strange", "a strange"),
    ]
    table = table_of(samples)
    assert table.variants == ("plain", "ablated 0", "random 0", "strange") and table.left_out == 0
    texts = [[answer and answer.text for answer in row.answers] for row in table.rows]
    assert texts == [["a0", "a ablated", None, "a strange"], ["b0", None, "b random", None], ["a1", None, None, None]]
    assert table.data["answers"][0][1] == ["a ablated", "complied", ""]
    assert (table.first, table.second) == (0, 1)


def test_answers_to_other_suffixes_and_settings_are_rows_of_their_own():
    samples = [sample("plain", suffix=i, setting="suffix") for i in (0, 1)] + [
        sample("plain"),
        sample("plain", set="x"),
    ]
    assert len(table_of(samples).rows) == 4 and table_of(samples).second is None


def test_answers_keep_within_the_budget(monkeypatch):
    monkeypatch.setattr(answers, "BUDGET", 40)
    samples = [
        sample("plain", "x" * 10, prompt=str(prompt), setting=setting, sample=i)
        for setting in ("vanilla", "decoding")
        for prompt in range(4)
        for i in range(2 if setting == "decoding" else 1)
    ]
    table = table_of(samples)
    kept = [(row.sample.setting, row.sample.prompt, row.sample.sample) for row in table.rows]
    assert kept == [("vanilla", "0", 0), ("vanilla", "1", 0), ("decoding", "0", 0), ("decoding", "1", 0)]
    assert table.left_out == 8
    assert "4 of 12 are shown here, all are in samples.jsonl." in " ".join(page_of(other_run(), samples).texts("p"))


def test_long_answers_are_clipped():
    (row,) = table_of([sample("plain", "x" * 9000)]).rows
    assert row.answers[0].text == "x" * LONGEST + "…"


def test_size_of_a_large_run():
    run = brittleness_run()
    more = [dataclasses.replace(run.table[4], group=f"r {i}", variants=(f"r {i}",)) for i in range(20)]
    run = dataclasses.replace(run, table=(*run.table, *more))
    samples = [sample(row.group, "x" * 900, prompt=f"{i}") for row in run.table for i in range(60)]
    text, _ = render(run, samples)
    assert 28 * 60 * 900 < len(text) < 2 * 28 * 60 * 900 + 700_000


@pytest.mark.parametrize(
    ("before", "after", "expected", "of_safe"),
    [
        (True, False, "stopped refusing", "better"),
        (False, True, "started refusing", "worse"),
        (True, True, "unchanged", ""),
        (False, False, "unchanged", ""),
        (None, False, "unscored", ""),
        (True, None, "unscored", ""),
    ],
)
def test_verdict(before, after, expected, of_safe):
    found = verdict(sample("a", refused=before), sample("b", refused=after))
    assert found == expected and found in VERDICTS
    assert judgement(found, False) == of_safe and judgement(found, None) == ""
    assert judgement(found, True) == {"better": "worse", "worse": "better", "": ""}[of_safe]
    assert verdict(None, sample("b")) == verdict(sample("a"), None) == "unscored"


def test_reading_of_a_steering_rule():
    assert reading(sample("a", score=0.4123, steered_as_harmful=True)) == "score 0.41, taken as harmful"
    assert reading(sample("a", score=0.4123)) == "score 0.41" and reading(sample("a")) == ""


def test_prompts_whose_verdict_changes_come_first_with_words_and_filters():
    samples = [
        *scans_samples(True, True, "first"),
        *scans_samples(True, False, "second", "safe_targets"),
        *scans_samples(False, True, "third", ""),
        *scans_samples(None, True, "fourth", "Homonyms", harmful=True),
    ]
    before, after = scans_samples(True, False, "fifth", "")
    samples += [before, dataclasses.replace(after, broken=True)]
    before, after = scans_samples(True, False, "sixth", "")
    samples += [dataclasses.replace(before, broken=True), after]
    page = page_of(scans_run(), samples)
    assert page.texts("p", **{"class": "prompt"}) == ["second", "third", "fifth", "sixth", "fourth", "first"]
    rows = [attributes for attributes, _ in page.all("tr") if "data-change" in attributes]
    assert [row["data-change"] for row in rows] == list(VERDICTS)
    assert [row["data-harmful"] for row in rows] == ["false", "false", "false", "false", "true", "false"]
    classes = [
        attributes["class"].split() for attributes, _ in page.all("b") if "change" in attributes.get("class", "")
    ]
    worse = ["change", "worse"]
    assert classes == [["change", "better"], worse, worse, ["change"], ["change"], ["change"]]
    assert {"answered", "refused", "broken", "unscored"} <= set(page.texts("b"))
    values = [attributes.get("value", text) for attributes, text in page.all("option")]
    assert values == ["", "lookalike", "harmful", "", "Homonyms", "homonyms", "safe_targets", "", *VERDICTS]
    assert page.all("form")[-1][0]["hidden"] is None, "without the script there is nothing to filter with"
    assert not [attributes for attributes, _ in page.all("tr") if "hidden" in attributes]
    prose = " ".join(page.texts("p"))
    assert (
        "From plain to steered: 1 stopped refusing, 1 started refusing, 1 broke, 1 mended, 1 unscored, 1 unchanged."
        in prose
    )
    assert "score 0.41, taken as safe" in page.texts("small")
    assert [attributes.get("type") for attributes, _ in page.all("script")] == [None], "two variants need no choice"


def test_page_shows_the_baseline_and_the_headline_first():
    samples = [*brittleness_samples(), sample("orthogonal", "No.", True), sample("utility alone", "Yes.", None)]
    page = page_of(brittleness_run(), samples)
    options = [(text, "selected" in a) for a, text in page.all("option") if text in {"dense", BEST, "orthogonal"}]
    first, second = options[:3], options[3:]
    assert first == [("dense", True), (BEST, False), ("orthogonal", False)]
    assert second == [("dense", False), (BEST, True), ("orthogonal", False)]
    assert page.texts("p", **{"class": "text"}) == ["I am sorry.", "Take a pick."]
    assert [a["data-change"] for a, _ in page.all("tr") if "data-change" in a] == ["stopped refusing"]


def test_answers_of_one_variant_alone():
    page = page_of(brittleness_run(), [sample("dense")])
    assert page.texts("p", **{"class": "text"}) == ["I am sorry."]
    assert len(page.all("script")) == 1 and not [a for a, _ in page.all("select") if a.get("id") == "first"]
    assert not [a for a, _ in page.all("b") if "change" in a.get("class", "")]
