"""What a SCANS report has of its own: classifier, directions, words, strength, and ranges of layers as they are."""

import dataclasses
import re

import pytest
from pages import Page
from runs import CURVE, SCORES, STEERED, scans_details, scans_run, scans_samples

from jaxsafe.records.run import plain
from jaxsafe.records.scans import ClassFigures, Classifier, Scores
from jaxsafe.report import plots_scans, scans
from jaxsafe.report.style import layer_axis, new_axes
from jaxsafe.report.write import render

HEADINGS = [
    "Refusals of the same prompts",
    "What each variant does",
    "Telling harmful from safe",
    "The refusal direction, layer by layer",
    "The direction in words",
    "Choice of strength",
    "Answers side by side",
    "Settings",
]


def page_of(details, samples=()):
    return Page(render(dataclasses.replace(scans_run(), details=plain(details)), samples)[0])


def test_whole_report():
    page = page_of(scans_details(), scans_samples())
    assert page.texts("h1") == ["Over-refusal of tiny-chat"] and page.texts("h2") == HEADINGS
    assert page.texts("p", **{"class": "result"}) == [
        "Refusals of safe lookalike prompts fell from 31% to 6% (n = 120, p < 0.001); "
        "refusals of harmful prompts 99% → 98%; broken answers 0% → 1%; perplexity went from 10 to 10.5 (+5.0%)."
    ]
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert facts["AUROC of the test prompts"] == "0.933 (0.81–1)" and facts["Treated rightly"] == "84.0% → 96.0%"
    rows = page.texts("tr")
    assert "safe the published figures are of this class, n = 575.0%100.0%85.7%0.917" in rows
    assert "harmful n = 376.5%87.6%65.4%0.987" in rows
    assert facts["New tokens"] == "32" and facts["Judge"] == "scans 1"
    assert facts["Steering"] == "steered layers 10 to 19 with alpha_rel 0.3; harmful from score 0.550 on"
    assert "lookalike (safe) should be answered, n = 120" in page.texts("th")
    cells = page.texts("td")
    assert "31.0% 21.0–41.0%" in cells and "6.0% 0.0–16.0%" in cells
    assert "−25 (−37 to −13) p < 0.001 57 stopped, 2 started refusing" in cells
    prose = " ".join(page.texts("p"))
    assert "averaged over layers 10 to 31" in prose
    assert "3 of 3 harmful ones and 1 of 5 safe ones were taken as harmful" in prose
    assert "Chosen: strength 0.3 (absolute 3) in layers 10 to 19." in prose
    assert [text for text in page.texts("mark") if "reject" in text] == ["reject (word of refusal)"]
    assert "safe targets n = 100" in page.texts("th") and len(page.all("svg")) == 12


def test_layers_are_those_that_were_steered():
    text, figures = render(scans_run(), scans_samples())
    assert "10 to 19" in text and "layers 10 to 20" in text, "a segment ends where the next begins"
    assert not re.search(r"10[-–]20|10[-–]19|10 to 32|10[-–]32", text)
    (cost,) = (figure.inline for figure in figures if figure.name == "strength-kl")
    assert "Chosen: strength 0.3 in layers 10 to 19" in cost
    assert {"layers 0 to 9", "10 to 19", "21 to 31"} <= set(Page(cost).texts("text"))


def test_shading_ends_between_layers():
    _, axes = new_axes(240)
    layer_axis(axes, 32, STEERED)
    (span,) = axes.patches
    assert span.get_x() == 9.5 and span.get_x() + span.get_width() == 19.5
    assert axes.get_xlim() == (-0.5, 31.5)


@pytest.mark.parametrize(
    ("part", "missing"),
    [("preparation", HEADINGS[3:6]), ("strength", HEADINGS[5:6]), ("separation", []), ("test", []), ("roc", [])],
)
def test_missing_part_leaves_its_section_out(part, missing):
    details = scans_details()
    if part == "preparation":
        details = dataclasses.replace(details, preparation=None)
    elif part in ("test", "roc"):
        absent = {"test": Scores((), ())} if part == "test" else {"roc": None}
        details = dataclasses.replace(details, classifier=dataclasses.replace(details.classifier, **absent))
    else:
        details = dataclasses.replace(details, preparation=dataclasses.replace(details.preparation, **{part: None}))
    page = page_of(details)
    assert page.texts("h2") == [heading for heading in HEADINGS if heading not in (*missing, HEADINGS[-2])]
    targets = [attributes["href"].removeprefix("#") for attributes, _ in page.all("a")]
    assert targets == [attributes["id"] for attributes, _ in page.all("section")]
    assert len(page.all("svg")) < 12


def test_undefined_numbers_are_dashes():
    details = scans_details()
    nothing = ClassFigures(5, None, None, None, None)
    undefined = dict.fromkeys(("auroc", "auroc_low", "auroc_high", "balanced_accuracy"))
    found = dataclasses.replace(details.classifier.found, safe=nothing, harmful=nothing, **undefined)
    changed = dataclasses.replace(details.classifier, found=found)
    page = page_of(dataclasses.replace(details, classifier=changed, average=(None, 0.9)))
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert facts["Balanced accuracy"] == "–" and facts["Treated rightly"] == "– → 90.0%"
    assert "AUROC of the test prompts" not in facts and "harmful n = 5––––" in page.texts("tr")


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.55, 0.6, 0.65, 0.75, 0.95])
def test_chosen_point_is_what_the_threshold_does(threshold):
    found = {True: 0, False: 0}
    for score, harmful in zip(SCORES.scores, SCORES.harmful, strict=True):
        found[harmful] += score >= threshold
    # The curve has no point between its thresholds, as scikit-learn drops those on a straight line.
    if threshold > 0.1:
        label = Page(plots_scans.roc("roc", CURVE, threshold).inline).all("svg")[0][0]["aria-label"]
        assert f"true positive rate {found[True] / 3:.1%}, false positive rate {found[False] / 5:.1%}" in label
    classifier = Classifier(STEERED, threshold, SCORES, None)
    assert scans.flagged(classifier) == {True: (found[True], 3), False: (found[False], 5)}
