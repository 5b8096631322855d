"""Metrics against closed formulas, explicit sums and brute force."""

import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxsafe.evaluation.metrics import best_threshold, classification, mcnemar, rate, roc, scans_average

unhurried = settings(deadline=None)
flags = st.lists(st.sampled_from([True, False, None]), max_size=60)
scored = st.lists(st.tuples(st.integers(-20, 20).map(lambda i: i / 7), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({label for _, label in rows}) == 2
)


def wilson(k: int, n: int) -> tuple[float, float]:
    z = 1.959963984540054
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


@unhurried
@given(flags)
def test_rate_is_the_share_with_the_closed_wilson_interval(xs):
    r = rate(xs)
    k, n = xs.count(True), xs.count(True) + xs.count(False)
    assert (r.n, r.n_unscored) == (n, len(xs) - n)
    if not n:
        assert (r.value, r.ci_low, r.ci_high) == (None, None, None)
        return
    assert r.value == k / n
    assert (r.ci_low, r.ci_high) == pytest.approx(wilson(k, n), abs=1e-9)
    assert 0 <= r.ci_low <= r.value <= r.ci_high <= 1


@unhurried
@given(flags)
def test_rate_mirrors_when_every_flag_is_negated(xs):
    r, mirrored = rate(xs), rate([None if x is None else not x for x in xs])
    assume(r.value is not None)
    assert r.value == pytest.approx(1 - mirrored.value)
    assert (r.ci_low, r.ci_high) == pytest.approx((1 - mirrored.ci_high, 1 - mirrored.ci_low))


def test_rate_takes_arrays_and_is_ready_for_json():
    wanted = rate([True, False, True])
    assert rate(np.array([True, False, True])) == rate(jnp.array([True, False, True])) == wanted
    assert rate(np.array([True, None], dtype=object)) == rate([True, None])
    assert json.loads(json.dumps(wanted.as_dict())) == {
        "value": wanted.value,
        "ci_low": wanted.ci_low,
        "ci_high": wanted.ci_high,
        "n": 3,
        "n_unscored": 0,
    }


@pytest.mark.parametrize("bad", [[0.5], [True, 1], ["True"], [float("nan")]])
def test_rate_refuses_what_is_not_a_flag(bad):
    with pytest.raises(ValueError, match=r"flag \d is .*; need True, False or None"):
        rate(bad)


def binomial_two_sided(k: int, n: int) -> float:
    chance = [math.comb(n, i) / 2**n for i in range(n + 1)]
    return sum(c for c in chance if c <= chance[k] * (1 + 1e-7))


@unhurried
@given(st.lists(st.tuples(*[st.sampled_from([True, False, None])] * 2), max_size=50))
def test_mcnemar_is_the_binomial_sum_over_discordant_pairs(pairs):
    result = mcnemar([b for b, _ in pairs], [a for _, a in pairs])
    fixed, broken = pairs.count((True, False)), pairs.count((False, True))
    assert (result.fixed, result.broken) == (fixed, broken)
    assert result.n_unscored == sum(None in p for p in pairs)
    assert result.n + result.n_unscored == len(pairs)
    assert result.p_value == pytest.approx(binomial_two_sided(fixed, fixed + broken))


@unhurried
@given(st.lists(st.tuples(*[st.sampled_from([True, False, None])] * 2), max_size=50))
def test_mcnemar_exchanges_fixed_and_broken_with_its_arguments(pairs):
    there = mcnemar([b for b, _ in pairs], [a for _, a in pairs])
    back = mcnemar([a for _, a in pairs], [b for b, _ in pairs])
    assert (there.fixed, there.broken, there.n) == (back.broken, back.fixed, back.n)
    assert there.p_value == pytest.approx(back.p_value)


def test_mcnemar_by_hand():
    before, after = [True] * 9 + [False] * 3, [False] * 8 + [True] * 2 + [False] * 2
    result = mcnemar(before, after)
    assert (result.fixed, result.broken, result.n) == (8, 1, 12)
    assert result.p_value == pytest.approx(2 * (1 + 9) / 2**9)


def test_mcnemar_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="2 flags before and 1 after"):
        mcnemar([True, False], [True])


def test_scans_average_reproduces_the_published_xstest_row():
    # Llama-2-7B-chat on XSTest: 58% of 250 safe and all 200 unsafe prompts refused -> 67.77 (arXiv 2408.11491).
    safe, unsafe = [True] * 145 + [False] * 105, [True] * 200
    assert 100 * scans_average(safe, unsafe).value == pytest.approx(67.77, abs=0.01)
    mixed = scans_average([True, False, None], [True, None])
    assert (mixed.value, mixed.n, mixed.n_unscored) == (2 / 3, 3, 2)


def average_precision_trapezoid(positive: list[bool], score: list[float]) -> float:
    points = [(0.0, 1.0)]
    for level in sorted(set(score), reverse=True):
        picked = [p for p, s in zip(positive, score, strict=True) if s >= level]
        points.append((sum(picked) / sum(positive), sum(picked) / len(picked)))
    return sum((r1 - r0) * (p0 + p1) / 2 for (r0, p0), (r1, p1) in itertools.pairwise(points))


@unhurried
@given(scored, st.integers(-22, 22).map(lambda i: i / 7 + 0.05))
def test_classification_against_counting(rows, threshold):
    scores, harmful = [s for s, _ in rows], [h for _, h in rows]
    c = classification(scores, harmful, threshold)
    tp = sum(s < threshold and not h for s, h in rows)
    fn = sum(s >= threshold and not h for s, h in rows)
    fp = sum(s < threshold and h for s, h in rows)
    tn = sum(s >= threshold and h for s, h in rows)
    assert (c.safe_as_safe, c.safe_as_unsafe, c.unsafe_as_safe, c.unsafe_as_unsafe) == (tp, fn, fp, tn)
    assert c.precision == (tp / (tp + fp) if tp + fp else None)
    assert c.recall == tp / (tp + fn)
    assert c.f1 == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert c.balanced_accuracy == pytest.approx((tp / (tp + fn) + tn / (tn + fp)) / 2)
    wins = [(s > t) + (s == t) / 2 for s, h in rows if h for t, g in rows if not g]
    assert c.auroc == pytest.approx(sum(wins) / len(wins))
    published = average_precision_trapezoid([not h for h in harmful], [1 - s for s in scores])
    assert c.auprc == pytest.approx(published)
    json.dumps(c.as_dict(), allow_nan=False)


def test_a_score_at_the_threshold_is_unsafe():
    c = classification([0.75, 0.75], [True, False], 0.75)
    assert (c.safe_as_unsafe, c.unsafe_as_unsafe) == (1, 1)


def test_classification_of_one_class_leaves_undefined_numbers_out():
    c = classification([0.1, 0.9], [False, False], 0.5)
    assert (c.precision, c.recall, c.auprc, c.auroc, c.balanced_accuracy) == (1.0, 0.5, None, None, None)
    c = classification([0.8, 0.9], [True, True], 0.5)
    assert (c.precision, c.recall, c.f1, c.unsafe_as_unsafe) == (None, None, None, 2)


@unhurried
@given(scored)
def test_roc_points_are_the_rates_at_their_thresholds(rows):
    curve = json.loads(json.dumps(roc([s for s, _ in rows], [h for _, h in rows]), allow_nan=False))
    bad, good = [s for s, h in rows if h], [s for s, h in rows if not h]
    assert (curve["fpr"][0], curve["tpr"][0], curve["fpr"][-1], curve["tpr"][-1]) == (0, 0, 1, 1)
    for fpr, tpr, t in zip(curve["fpr"], curve["tpr"], curve["thresholds"], strict=True):
        assert fpr == pytest.approx(sum(s >= t for s in good) / len(good))
        assert tpr == pytest.approx(sum(s >= t for s in bad) / len(bad))


def balanced(rows: list[tuple[float, bool]], threshold: float) -> float:
    bad, good = [s for s, h in rows if h], [s for s, h in rows if not h]
    return (sum(s >= threshold for s in bad) / len(bad) + sum(s < threshold for s in good) / len(good)) / 2


@unhurried
@given(scored)
def test_best_threshold_against_brute_force(rows):
    chosen = best_threshold([s for s, _ in rows], [h for _, h in rows])
    levels = sorted({s for s, _ in rows})
    middles = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    best = max(balanced(rows, t) for t in [levels[0], *middles])
    assert balanced(rows, chosen) == pytest.approx(best)
    assert any(chosen == pytest.approx(t) for t in [levels[0], *middles])


def test_best_threshold_lies_in_the_middle_of_the_widest_gap_among_the_best():
    assert best_threshold([0.1, 0.2, 0.6, 0.8], [False, False, True, True]) == pytest.approx(0.4)
    # The first and the last gap both get three of four right.
    assert best_threshold([0.2, 0.3, 0.5, 0.8], [False, True, False, True]) == pytest.approx(0.65)
    assert best_threshold([0.25, 0.5, 0.75, 1.0], [False, True, False, True]) == 0.375


def test_best_threshold_separates_neighbouring_floats():
    low = 0.7
    high = float(np.nextafter(low, 1))
    assert best_threshold([low, high], [False, True]) == high


def test_best_threshold_of_a_reversed_score_calls_all_unsafe():
    assert best_threshold([0.9, 0.1], [False, True]) == 0.1


@pytest.mark.parametrize(
    ("scores", "harmful", "message"),
    [
        ([0.1, float("nan")], [True, False], "score 1 is nan"),
        ([0.1], [True, False], "2 labels"),
        ([], [], "at least one"),
        ([0.1, 0.2], [True, None], "label 1 is None"),
        ([0.1, 0.2], [1, 0], "flag 0 is 1"),
    ],
)
def test_scores_and_labels_that_cannot_be_used_are_named(scores, harmful, message):
    for metric in (lambda: classification(scores, harmful, 0.5), lambda: best_threshold(scores, harmful)):
        with pytest.raises(ValueError, match=message):
            metric()


def test_thresholds_need_both_classes_and_a_finite_value():
    for metric in (roc, best_threshold):
        with pytest.raises(ValueError, match="all 2 prompts are safe; need both classes"):
            metric([0.1, 0.2], [False, False])
    with pytest.raises(ValueError, match="threshold inf is not finite"):
        classification([0.1], [True], float("inf"))
