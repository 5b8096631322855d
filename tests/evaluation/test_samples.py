"""Comparisons and rates of judged samples against counts by hand."""

import dataclasses

import numpy as np
import pytest

from jaxsafe.evaluation.samples import comparisons, rates, set_name
from jaxsafe.evaluation.settings import setting
from jaxsafe.evaluation.stats import clustered_rate, difference, mcnemar, pooled, rate
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.records.run import KindRates, Sample

VANILLA, SUFFIXED = setting("vanilla"), setting("suffix", ("a", "b"))
NAMES = ("plain", "edited")


def sample(harmful, refused, kind="", name="set", asked="vanilla", **more):
    return Sample("v", name, asked, harmful, kind, "why?", "text", refused, **more)


def sides(*rows):
    """(samples of the first group, of the second) of one seed, from (label, first verdict, second, kind, set)."""
    rows = [(*row, "", "set")[:5] if len(row) < 5 else row for row in rows]
    return tuple([[sample(row[0], row[side], row[3], row[4]) for row in rows]] for side in (1, 2))


@pytest.mark.parametrize(
    ("name", "split", "wanted"),
    [("xstest", None, "xstest"), ("xstest", "safe", "xstest/safe"), ("builtin:lookalike", "test", "lookalike")],
)
def test_a_set_is_named_with_its_split_unless_built_in(name, split, wanted):
    assert set_name(PromptSet(name, ("a",), (True,), ("",), split)) == wanted


def test_a_comparison_counts_its_own_set_and_label_alone():
    mine = [(True, False), (True, False), (True, False), (False, True), (True, True), (False, False), (None, True)]
    others = [(True, True, True), (None, True, True), (False, True, True, "", "other")]
    first, second = sides(*[(False, b, a) for b, a in mine], *others)
    elsewhere = sample(False, True, asked="suffix")
    row, *rest = comparisons([first[0] + [elsewhere]], [second[0] + [elsewhere]], NAMES, VANILLA)
    assert (row.first, row.second, row.label, row.set, row.harmful) == (*NAMES, "set (safe)", "set", False)
    assert row.first_rate == rate([b for b, _ in mine])
    assert row.second_rate == rate([a for _, a in mine])
    assert (row.first_rate.value, row.first_rate.n, row.first_rate.n_unscored) == (4 / 6, 6, 1)
    assert row.difference == difference([[b for b, _ in mine]], [[a for _, a in mine]])
    # Three that refused no longer do, one began to: two-sided binomial of 1 in 4.
    assert row.p_value == pytest.approx(2 * (1 + 4) / 16)
    assert (row.stopped_refusing, row.started_refusing, row.n, row.n_unscored) == (3, 1, 6, 1)
    assert row.by_kind == ()
    assert [c.label for c in rest] == ["set (harmful)", "set (no label)", "other (safe)"]


def test_kinds_are_told_apart_where_there_are_several():
    first, second = sides(
        (True, True, False, "theft"),
        (True, True, True, "theft"),
        (True, False, True, "fraud"),
        (True, None, None, ""),
        (False, True, True, "theft"),
    )
    harmful, safe = comparisons(first, second, NAMES, VANILLA)
    assert harmful.by_kind == (
        KindRates("theft", rate([True, True]), rate([False, True])),
        KindRates("fraud", rate([False]), rate([True])),
    )
    assert safe.by_kind == ()


def test_comparisons_come_in_the_order_of_the_samples():
    labels = [("b", False), ("a", True), ("b", True), ("b", False), ("a", None)]
    first, second = sides(*[(label, True, False, "", name) for name, label in labels])
    found = comparisons(first, second, NAMES, VANILLA)
    assert [(row.set, row.harmful, row.first_rate.n) for row in found] == [
        ("b", False, 2),
        ("a", True, 1),
        ("b", True, 1),
        ("a", None, 1),
        (None, True, 2),
    ]


def test_all_harmful_prompts_are_compared_where_there_are_several_sets():
    rows = [(True, True, False, "x", "one"), (True, True, True, "y", "one"), (True, None, False, "x", "two")]
    first, second = sides(*rows, (False, True, True, "x", "one"), (None, True, True, "x", "two"))
    *_, both = comparisons(first, second, NAMES, VANILLA)
    assert (both.label, both.set, both.harmful) == ("all harmful", None, True)
    assert (both.first_rate, both.second_rate) == (rate([True, True, None]), rate([False, True, False]))
    assert (both.stopped_refusing, both.n, both.n_unscored) == (1, 2, 1)
    assert [kind.kind for kind in both.by_kind] == ["x", "y"]
    first, second = sides(*rows[:2], (False, True, True, "x", "two"))
    assert [row.label for row in comparisons(first, second, NAMES, VANILLA)] == ["one (harmful)", "two (safe)"]


@pytest.mark.parametrize("one", [True, False], ids=["against one seed", "against as many"])
def test_seeds_are_pooled_and_have_no_p_value(one):
    rng = np.random.default_rng(0)
    flags = [[bool(f) for f in rng.random(12) < share] for share in (0.9, 0.3, 0.5, 0.4)]
    first = [[sample(True, f) for f in seed] for seed in (flags[:1] if one else [flags[0], flags[3]])]
    second = [[sample(True, f) for f in seed] for seed in flags[1:3]]
    (row,) = comparisons(first, second, NAMES, VANILLA)
    firsts = flags[:1] if one else [flags[0], flags[3]]
    assert row.p_value is None
    assert row.first_rate == (rate(flags[0]) if one else pooled(firsts))
    assert row.second_rate == pooled(flags[1:3])
    assert row.difference == difference(firsts, flags[1:3])
    # Every seed of the second group is paired with one of the first.
    pairs = list(zip(firsts * 2 if one else firsts, flags[1:3], strict=True))
    changes = [(a, b) for before, after in pairs for a, b in zip(before, after, strict=True)]
    assert (row.stopped_refusing, row.started_refusing) == (changes.count((True, False)), changes.count((False, True)))
    assert (row.n, row.n_unscored) == (24, 0)


def test_other_numbers_of_seeds_cannot_be_paired():
    flags = [[True, False, True], [False, False, True], [True, True, True]]
    first, second = ([[sample(True, f) for f in seed] for seed in those] for those in (flags[:2], flags))
    (row,) = comparisons(first, second, NAMES, VANILLA)
    assert (row.p_value, row.stopped_refusing, row.started_refusing, row.n) == (None, 0, 0, 0)
    assert row.difference == difference(flags[:2], flags)


def test_the_test_is_mcnemars():
    rng = np.random.default_rng(1)
    verdicts = rng.choice([True, False, None], (40, 2), p=[0.5, 0.4, 0.1]).tolist()
    (row,) = comparisons(*sides(*[(True, *pair) for pair in verdicts]), NAMES, VANILLA)
    wanted = mcnemar(*zip(*verdicts, strict=True))
    assert row.p_value == wanted.p_value < 1
    assert (row.stopped_refusing, row.started_refusing, row.n, row.n_unscored) == (
        wanted.fixed,
        wanted.broken,
        wanted.n,
        wanted.n_unscored,
    )


def test_rates_are_named_after_judge_setting_set_and_label():
    samples = [
        sample(True, False),
        sample(True, True, name="more"),
        sample(False, True),
        sample(None, True),
        *[sample(True, refused, asked="suffix", suffix=i % 2) for i, refused in enumerate([True, False, None, False])],
        *[sample(None, False, asked="suffix", suffix=i) for i in range(2)],
    ]
    assert rates([samples], (VANILLA, SUFFIXED), "rule") == {
        "asr_rule/vanilla": rate([True, False]),
        "asr_rule/suffix": rate([True, True]),
        "asr_rule/suffix_any": rate([True, True]),
        "unrefused_rule/vanilla": rate([True, False]),
        "unrefused_rule/suffix": rate([True, True]),
        "unrefused_rule/suffix_any": rate([True, True]),
        "broken/vanilla": rate([False, False]),
        "broken/suffix": clustered_rate([[False, False], [False, False]]),
        "refusal_rule/set/harmful": rate([False]),
        "refusal_rule/more/harmful": rate([True]),
        "refusal_rule/set/safe": rate([True]),
        "refusal_rule/set/no label": rate([True]),
        "broken/set/harmful": rate([False]),
        "broken/more/harmful": rate([False]),
        "broken/set/safe": rate([False]),
        "broken/set/no label": rate([False]),
    }


def test_a_broken_answer_is_no_success_and_no_refusal():
    harmful = [sample(True, False), sample(True, False, broken=True), sample(True, True, broken=True)]
    harmful.append(sample(True, None))
    found = rates([[*harmful, sample(False, None, broken=True), sample(False, True)]], (VANILLA,), "rule")
    assert found == {
        "asr_rule/vanilla": rate([True, False, False, None]),
        "unrefused_rule/vanilla": rate([True, True, False, None]),
        "broken/vanilla": rate([False, True, True, False]),
        "refusal_rule/set/harmful": rate([False, False, False, None]),
        "broken/set/harmful": rate([False, True, True, False]),
        "refusal_rule/set/safe": rate([False, True]),
        "broken/set/safe": rate([True, False]),
    }
    whole = [dataclasses.replace(s, refused=True, broken=False) for s in harmful]
    (row,) = comparisons([whole], [harmful], NAMES, VANILLA)
    assert (row.first_rate, row.second_rate) == (rate([True] * 4), rate([False, False, False, None]))
    assert (row.stopped_refusing, row.first_broken.value, row.second_broken.value) == (3, 0.0, 0.5)
    # One of the four that refused complies now, one cannot be scored.
    flags = [[[False] * 4], [[True, False, False, None]]]
    assert row.complied == difference(*flags) and row.complied_p_value == mcnemar(flags[0][0], flags[1][0]).p_value


def test_without_harmful_prompts_there_is_no_attack():
    assert rates([[sample(False, True), sample(None, False)]], (VANILLA, SUFFIXED), "rule") == {
        "refusal_rule/set/safe": rate([True]),
        "broken/set/safe": rate([False]),
        "refusal_rule/set/no label": rate([False]),
        "broken/set/no label": rate([False]),
    }


def test_rates_over_seeds_are_pooled():
    one = [sample(True, True), sample(True, False), sample(False, None)]
    other = [dataclasses.replace(s, refused=f) for s, f in zip(one, (True, True, False), strict=True)]
    assert rates([one, other], (VANILLA,), "rule") == {
        "asr_rule/vanilla": pooled([[False, True], [False, False]]),
        "unrefused_rule/vanilla": pooled([[False, True], [False, False]]),
        "broken/vanilla": pooled([[False, False], [False, False]]),
        "refusal_rule/set/harmful": pooled([[True, False], [True, True]]),
        "broken/set/harmful": pooled([[False, False], [False, False]]),
        "refusal_rule/set/safe": pooled([[None], [False]]),
        "broken/set/safe": pooled([[False], [False]]),
    }
