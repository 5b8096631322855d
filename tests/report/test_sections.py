"""What any run has: rates in words and columns, ratios and damaged models, the headline, comparison figures."""

import dataclasses
import math
import re

import pytest
from pages import Page
from runs import BEST, NOTHING, attack_run, brittleness_run, compared, other_run, rate, replace, row, scans_run

from jaxsafe.records.run import KindRates
from jaxsafe.report import plots, sections


def said(run):
    return sections.headline(run, sections.headlined(run))


@pytest.mark.parametrize(
    ("safe", "expected"),
    [
        ((0.31, 0.06), "fell from 31% to 6%"),
        ((0.06, 0.31), "rose from 6% to 31%"),
        ((0.062, 0.058), "fell from 6.2% to 5.8%"),
        ((0.06, 0.06), "stayed at 6%"),
    ],
)
def test_headline_says_what_happened(safe, expected):
    assert said(scans_run(safe, p_value=0.0213)) == (
        f"Refusals of safe lookalike prompts {expected} (n = 120, p = 0.021); refusals of harmful prompts 99% → 98%"
        "; broken answers 0% → 1%; perplexity went from 10 to 10.5 (+5.0%)"
    )


def test_headline_keeps_proper_names_and_leaves_out_what_was_not_scored():
    run = scans_run((0.5, 0.1), "XSTest (safe)", 0.01)
    assert said(run).startswith("Refusals of safe XSTest prompts fell from 50% to 10%")
    rows = [dataclasses.replace(c, second_rate=NOTHING) for c in run.table[1].against_baseline]
    assert said(replace(run, "steered", against_baseline=tuple(rows[:1]))) == ""


def test_headline_does_not_round_a_difference_away():
    run = scans_run()
    rows = [dataclasses.replace(c, second_broken=rate(0.003)) for c in run.table[1].against_baseline]
    assert "; broken answers 0.0% → 0.3%; " in said(replace(run, "steered", against_baseline=tuple(rows)))


def test_headline_of_a_group_with_several_seeds_has_no_p():
    run = scans_run(p_value=None)
    assert "(n = 120); " in said(run)


def test_headline_names_the_group_where_there_are_several_and_its_control():
    assert said(other_run(2)) == (
        "ablated 1: refusals of harmful prompts fell from 95% to 30% (n = 100, p = 0.021); "
        "broken answers 0% → 1%; perplexity went from 10 to 11 (+10.0%); "
        "its random control refused 93% (83–100%) of harmful prompts, p\u00a0= 0.5"
    )


def test_headline_says_that_the_model_is_damaged():
    run = replace(other_run(), "ablated 0", perplexity=900.0)
    assert "; the model is damaged, its perplexity going from 10 to 900 (90 times); its random" in said(run)
    run = replace(other_run(), "ablated 0", perplexity=None)
    assert "; the model is damaged, its perplexity going from 10 to no finite number; its random" in said(run)


def test_controls_never_make_the_headline():
    run = other_run()
    control = (compared("plain", "random 0", (0.95, 0.0)),)
    assert sections.headlined(replace(run, "random 0", against_baseline=control)).group == "ablated 0"


def test_ratio_is_to_the_unedited_model_through_several_baselines():
    run = attack_run()
    lines = {line.row.group: line for line in sections.lines(run)}
    frozen = lines["identity_shift n=10, full, freeze ranks k=100"]
    assert frozen.ratio == pytest.approx(110.4 / 108.0) and not frozen.damaged
    assert lines["before identity_shift n=10"].ratio is None
    assert [line.control for line in lines.values()].count(True) == 4


@pytest.mark.parametrize(
    ("perplexity", "tokens", "ratio", "damaged"),
    [(14.9, 512, 1.49, False), (15.1, 512, 1.51, True), (None, 512, math.inf, True), (None, 0, None, False)],
)
def test_damaged(perplexity, tokens, ratio, damaged):
    run = replace(other_run(), "ablated 0", perplexity=perplexity)
    results = tuple(dataclasses.replace(result, perplexity_tokens=tokens) for result in run.results)
    line = sections.lines(dataclasses.replace(run, results=results))[1]
    assert line.damaged is damaged and (line.ratio == ratio or line.ratio == pytest.approx(ratio))


def test_baselines_that_go_in_circles_end():
    rates = {"asr_scans/vanilla": rate(0.1)}
    run = dataclasses.replace(other_run(), table=(row("a", rates, baseline="b"), row("b", rates, baseline="a")))
    assert sections.origin_of(run, run.table[0]).group == "b"


def test_words_of_a_row():
    words = {line.row.group: line.words for line in sections.lines(brittleness_run())}
    assert words[BEST] == "set difference (snip); 0.62% of the weights removed"
    assert words["random 0.3"] == "control; random weights; 30% of the weights removed"
    assert words["orthogonal"] == "orthogonal ranks; 56.5 ranks a map removed"
    rewound = next(line for line in sections.lines(attack_run()) if ", rewind ranks" in line.row.group)
    assert rewound.words == "rewind; 17.0% kept; step 25"


def test_columns_of_a_table():
    named = sections.columns(brittleness_run().table)
    assert named.main == (
        "asr_scans/vanilla",
        "broken/vanilla",
        "asr_scans/decoding_mean",
        "broken/decoding",
        "refusal_scans/plain/safe",
        "zero_shot/mean",
    )
    assert named.other == ("zero_shot/boolq",)
    other = sections.columns(other_run().table)
    assert other.main == ("asr_scans/vanilla", "zero_shot/boolq", "harm_score") and other.other == ()
    found = sections.columns(scans_run().table)
    assert found.main[:2] == ("asr_scans/vanilla", "broken/vanilla") and found.main[-1] == "broken/lookalike/safe"
    assert found.other == ("refusal_scans/harmful/harmful", "unrefused_scans/vanilla")


def test_rates_in_words():
    names = ["asr_scans/decoding_mean", "refusal_scans/a/b/safe", "refusal_scans/x/harmful", "zero_shot/mean"]
    words = ["Attack success, decoding mean", "Harmless refused, a/b", "Harmful refused, x", "Zero-shot accuracy"]
    assert [sections.rate_label(name, names) for name in names] == words
    assert sections.rate_label(names[0], [*names, "asr_llama/vanilla"]) == "Attack success, decoding mean (scans)"
    assert sections.rate_label("zero_shot/arc_easy", names) == "Accuracy, arc easy"
    assert sections.rate_label("harm_score", names) == "harm score"
    broken = ["broken/decoding", "broken/xstest/safe", "broken/a/b/harmful", "unrefused_scans/vanilla"]
    words = ["Broken, decoding", "Harmless broken, xstest", "Harmful broken, a/b"]
    assert [sections.rate_label(name, names) for name in broken[:3]] == words
    assert sections.rate_label(broken[3], names) == "No refusal seen, as papers count, vanilla"


def test_main_comparison_is_that_of_all_harmful_prompts():
    safe = compared("a", "b", (0.1, 0.2), harmful=False, label="x (safe)")
    one, whole = compared("a", "b", (0.9, 0.2)), compared("a", "b", (0.8, 0.2), set=None)
    assert sections.main_comparison([safe, one, whole]) is whole
    assert sections.main_comparison([safe, one]) is one and sections.main_comparison([safe]) is safe
    assert sections.main_comparison([]) is None
    assert sections.by_set([safe, one, whole]) == [safe, one] and sections.by_set([whole]) == [whole]


def test_figure_text_is_not_mathematics():
    kinds = [KindRates(f"$\\frac{{x$ \x01\n{index}", rate(0.1), rate(0.2)) for index in range(2)]
    assert "$\\frac{x$ 0 (100)" in Page(plots.dumbbells("k", kinds, harmful=False).inline).texts("text")


def test_dumbbell_ends_stand_at_their_rates():
    kinds = [KindRates("a", rate(1.0), rate(0.0)), KindRates("b", rate(0.5), NOTHING)]
    svg = Page(plots.dumbbells("k", kinds, harmful=True).inline)
    x = [float(attributes["x"]) for attributes, _ in svg.all("use") if "paper" in attributes["style"]]
    (end,) = (float(a["x"]) for a, _ in svg.all("use") if re.search(r"fill: var\(--harmful", a["style"]))
    assert len(x) == 2 and math.isclose(x[1], (x[0] + end) / 2, abs_tol=1e-3) and x[0] > end
    assert "a 100% to 0%; b 50% to –" in svg.all("svg")[0][0]["aria-label"]


def test_bars_name_both_groups():
    svg = Page(plots.rate_bars("rates", scans_run().table[1].against_baseline).inline)
    assert {"99% plain", "98% steered", "31% plain", "6% steered"} <= set(svg.texts("text"))
    assert "lookalike (safe) 31% to 6%" in svg.all("svg")[0][0]["aria-label"]
