"""Numbers against closed formulas, explicit sums, brute force and the bootstrap."""

import dataclasses
import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap
from scipy.stats import t as student

from jaxsafe.evaluation.stats import (
    best_threshold,
    classification,
    clustered_rate,
    difference,
    mcnemar,
    mean_rate,
    pooled,
    rate,
    roc,
    scans_average,
)
from jaxsafe.records.run import Difference, Rate, to_json

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
    assert json.loads(to_json(wanted)) == {
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
    assert (c.safe.n, c.harmful.n) == (tp + fn, fp + tn)
    assert c.safe.precision == (tp / (tp + fp) if tp + fp else None)
    assert c.safe.recall == tp / (tp + fn)
    assert c.safe.f1 == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert c.harmful.precision == (tn / (tn + fn) if tn + fn else None)
    assert c.harmful.recall == tn / (tn + fp)
    assert c.harmful.f1 == pytest.approx(2 * tn / (2 * tn + fp + fn))
    assert c.balanced_accuracy == pytest.approx((tp / (tp + fn) + tn / (tn + fp)) / 2)
    wins = [(s > t) + (s == t) / 2 for s, h in rows if h for t, g in rows if not g]
    assert c.auroc == pytest.approx(sum(wins) / len(wins))
    published = average_precision_trapezoid([not h for h in harmful], [-s for s in scores])
    assert c.safe.auprc == pytest.approx(published)
    assert c.harmful.auprc == pytest.approx(average_precision_trapezoid(harmful, scores))
    assert 0 <= c.auroc_low <= c.auroc <= c.auroc_high <= 1
    assert json.loads(to_json(c)) == dataclasses.asdict(c)


def test_a_score_at_the_threshold_is_unsafe():
    c = classification([0.75, 0.75], [True, False], 0.75)
    assert (c.safe_as_unsafe, c.unsafe_as_unsafe) == (1, 1)


def test_classification_of_one_class_leaves_undefined_numbers_out():
    c = classification([0.1, 0.9], [False, False], 0.5)
    assert (c.safe.precision, c.safe.recall, c.safe.auprc) == (1.0, 0.5, None)
    assert (c.auroc, c.auroc_low, c.auroc_high, c.balanced_accuracy) == (None,) * 4
    c = classification([0.8, 0.9], [True, True], 0.5)
    assert (c.safe.precision, c.safe.recall, c.safe.f1, c.unsafe_as_unsafe) == (None, None, None, 2)


def test_the_interval_of_an_area_is_that_of_hanley_and_mcneil():
    # Their formula by hand: area .75 of 2 harmful and 2 safe prompts.
    c = classification([0.9, 0.3, 0.5, 0.1], [True, True, False, False], 0.5)
    q1, q2 = 0.75 / 1.25, 2 * 0.75**2 / 1.75
    error = math.sqrt((0.75 * 0.25 + (q1 - 0.75**2) + (q2 - 0.75**2)) / 4)
    assert (c.auroc, c.auroc_low, c.auroc_high) == (0.75, pytest.approx(max(0, 0.75 - 1.959964 * error)), 1.0)
    rng = np.random.default_rng(0)
    many = classification(
        np.concatenate([rng.normal(1, 1, 400), rng.normal(0, 1, 600)]), [True] * 400 + [False] * 600, 0
    )
    draws = [np.mean(rng.normal(1, 1, 400)[:, None] > rng.normal(0, 1, 600)[None]) for _ in range(300)]
    assert (many.auroc_high - many.auroc_low) / 2 == pytest.approx(1.96 * np.std(draws), rel=0.2)


@unhurried
@given(scored)
def test_roc_points_are_the_rates_at_their_thresholds(rows):
    curve = json.loads(to_json(roc([s for s, _ in rows], [h for _, h in rows])))
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


def test_independent_samples_count_in_full_and_equal_ones_once():
    def ends(r):
        return pytest.approx((r.value, r.ci_low, r.ci_high))

    def clustered(groups):
        r = clustered_rate(groups)
        return r.value, r.ci_low, r.ci_high

    singles = [True] * 3 + [False] * 9
    assert clustered([[flag] for flag in singles]) == ends(rate(singles))
    assert clustered([[flag] * 5 for flag in singles]) == ends(rate(singles))
    assert clustered([[True, False, False, False]] * 7) == ends(rate([True, False, False, False] * 7))
    assert clustered([[False] * 5] * 20) == ends(rate([False] * 20))
    assert clustered([[True] * 5, [True, None], [None]]) == ends(rate([True] * 2))
    assert clustered_rate([[None], []]) == rate([None])
    with pytest.raises(ValueError, match="need True, False or None"):
        clustered_rate([[1]])


def drawn(rng, prompts):
    """Samples of prompts that differ in how easily they succeed."""
    return rng.random((prompts, 5)) < rng.beta(0.6, 1.4, prompts)[:, None]


def test_the_interval_over_prompts_is_that_of_the_bootstrap():
    flags = drawn(np.random.default_rng(0), 200)
    got = clustered_rate(flags.tolist())
    by_prompt = bootstrap((flags.mean(1),), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    naive = rate(flags.ravel())
    assert got.value == flags.mean()
    np.testing.assert_allclose((got.ci_low, got.ci_high), by_prompt, atol=0.006)
    assert got.ci_high - got.ci_low > 1.3 * (naive.ci_high - naive.ci_low)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [r.ci_low <= 0.3 <= r.ci_high for r in (clustered_rate(drawn(rng, 50).tolist()) for _ in range(400))]
    assert 0.92 <= np.mean(held) <= 0.98


def ends(r):
    return r.value, r.ci_low, r.ci_high


def test_a_pooled_rate_of_one_seed_is_wilsons():
    flags = [True, False, None, True, False, False]
    assert pooled([flags]) == rate(flags)
    assert (pooled([flags]).value, pooled([flags]).n, pooled([flags]).n_unscored) == (0.4, 5, 1)


seeds = st.integers(2, 4).flatmap(
    lambda n: st.lists(st.tuples(*[st.sampled_from([True, False, None])] * n), min_size=1, max_size=12)
)


@unhurried
@given(seeds)
def test_seeds_are_pooled_with_prompts_as_clusters(prompts):
    found, over_prompts = pooled([list(flags) for flags in zip(*prompts, strict=True)]), clustered_rate(prompts)
    scored = [flag for flags in prompts for flag in flags if flag is not None]
    assert (found.n, found.n_unscored) == (len(scored), sum(map(len, prompts)) - len(scored))
    assert found.value == (sum(scored) / len(scored) if scored else None)
    if scored:
        assert 0 <= found.ci_low <= over_prompts.ci_low + 1e-12 and over_prompts.ci_high - 1e-12 <= found.ci_high <= 1


def crossed(rng, draws, prompts, spread):
    """Verdicts [draw, prompt] whose chance is that of the prompt plus a shift of the draw of deviation `spread`."""
    chance = rng.uniform(0.2, 0.6, prompts)[None] + rng.uniform(-1, 1, (draws, 1)) * spread * np.sqrt(3)
    return rng.random((draws, prompts)) < chance


def test_the_interval_over_draws_and_prompts_follows_from_their_analysis_of_variance():
    """Against mean squares of the crossed table, and the quantile of Wilson's score equation itself."""
    flags = crossed(np.random.default_rng(2), 4, 60, 0.1)
    draws, prompts = flags.shape
    p, x = flags.mean(), flags.astype(float)
    residual = x - x.mean(0) - x.mean(1, keepdims=True) + p
    by_draw = prompts * np.sum((x.mean(1) - p) ** 2) / (draws - 1)
    by_prompt, rest = draws * np.sum((x.mean(0) - p) ** 2) / prompts, np.sum(residual**2) / (draws - 1) / prompts
    assert by_prompt > rest and by_draw > rest
    cells = draws * prompts
    variance = (by_draw + by_prompt - rest) / cells
    degrees = variance**2 / ((by_draw / cells) ** 2 / (draws - 1))
    found = pooled(flags.tolist())
    assert (found.value, found.n) == (p, cells)
    for end in (found.ci_low, found.ci_high):
        # The variance at a limit is that at p in the ratio of the binomial variances.
        score = abs(p - end) / np.sqrt(variance * end * (1 - end) / (p * (1 - p)))
        assert score == pytest.approx(student.ppf(0.975, degrees), rel=1e-6)


@pytest.mark.parametrize("draws, spread", [(3, 0.0), (3, 0.1), (5, 0.1)])
def test_the_interval_over_draws_covers_the_truth(draws, spread):
    rng = np.random.default_rng(0)
    tables = [crossed(rng, draws, 60, spread) for _ in range(600)]
    both = [pooled(flags.tolist()) for flags in tables]
    assert np.mean([r.ci_low <= 0.4 <= r.ci_high for r in both]) >= 0.92
    if spread:
        prompts_alone = [clustered_rate(flags.T.tolist()) for flags in tables]
        assert np.mean([r.ci_low <= 0.4 <= r.ci_high for r in prompts_alone]) < 0.9


def test_a_difference_from_random_draws_covers_the_truth():
    """Prompts are shared by both sides, draws are of one of them."""
    rng, held = np.random.default_rng(1), []
    for _ in range(300):
        hard = rng.uniform(0.2, 0.6, 60)
        ours = (rng.random((1, 60)) < hard + 0.2).tolist()
        shifts = rng.uniform(-1, 1, (3, 1)) * 0.1 * np.sqrt(3)
        found = difference((rng.random((3, 60)) < hard + shifts).tolist(), ours)
        held.append(found.ci_low <= 0.2 <= found.ci_high)
    assert np.mean(held) >= 0.93


def test_seeds_that_agree_add_nothing():
    one = [True] * 6 + [False] * 14
    alone, many = pooled([one]), pooled([one] * 5)
    np.testing.assert_allclose(many.ci_low, alone.ci_low, atol=0.02)
    rng = np.random.default_rng(0)
    apart = pooled([list(map(bool, rng.permutation(one))) for _ in range(5)])
    assert apart.ci_high - apart.ci_low < 0.7 * (many.ci_high - many.ci_low)
    assert apart.value == 0.3 and apart.n == 100


def newcombe(a, b):
    """Newcombe's paired interval (1998, method 10) of two lists of flags, without continuity correction."""
    (p, q), (pl, pu), (ql, qu) = ((np.mean(a), np.mean(b)), *((r.ci_low, r.ci_high) for r in (rate(a), rate(b))))
    x, y = np.array(a, float), np.array(b, float)
    spread = np.sqrt(p * (1 - p) * q * (1 - q))
    phi = max(0.0, np.mean((x - p) * (y - q)) / spread) if spread else 0.0
    low = np.sqrt((p - pl) ** 2 - 2 * phi * (p - pl) * (qu - q) + (qu - q) ** 2)
    high = np.sqrt((q - ql) ** 2 - 2 * phi * (pu - p) * (q - ql) + (pu - p) ** 2)
    return p - q, p - q - low, p - q + high


@pytest.mark.parametrize("seed", range(4))
def test_a_difference_of_one_seed_is_newcombes(seed):
    rng = np.random.default_rng(seed)
    a = [bool(f) for f in rng.random(30) < 0.8]
    b = [f and bool(rng.random() < 0.6) for f in a]
    np.testing.assert_allclose(ends(difference([b], [a])), newcombe(a, b), atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_difference_turns_round_with_its_sides(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random((3, 20)) < 0.7, rng.random((2, 20)) < 0.4
    there, back = ends(difference(a.tolist(), b.tolist())), ends(difference(b.tolist(), a.tolist()))
    np.testing.assert_allclose(there, [-back[0], -back[2], -back[1]], atol=1e-12)
    assert there[0] == pytest.approx(b.mean() - a.mean())


def test_a_difference_covers_the_truth():
    rng, covered = np.random.default_rng(7), 0
    for _ in range(200):
        hard = rng.random(40)
        draw = [
            [[bool(u < p) for u, p in zip(rng.random(40), np.clip(hard * s, 0, 1), strict=True)] for _ in range(3)]
            for s in (0.9, 1.4)
        ]
        truth = np.mean(np.clip(np.linspace(0, 1, 20001) * 1.4, 0, 1)) - 0.45
        found = difference(*draw)
        covered += found.ci_low <= truth <= found.ci_high
    assert covered > 184


def test_a_difference_of_the_certain_is_not_certain():
    found = difference([[False] * 10], [[True] * 10])
    assert found.value == 1.0 and 0.5 < found.ci_low < 0.8 and found.ci_high == 1.0
    assert difference([[None]], [[True]]) == difference([[True]], [[None]]) == Difference(None, None, None)


def test_the_mean_of_rates_is_unweighted():
    one, other = rate([True] * 3 + [False]), rate([False] * 40)
    mean = mean_rate({"one": one, "other": other})
    assert (mean.value, mean.n) == (0.375, 44)
    # Zou, Huang and Zhang 2009: distances to the limits add as the sides of a right angle do.
    assert mean.ci_low == pytest.approx(0.375 - math.hypot(0.75 - one.ci_low, 0.0) / 2)
    assert mean.ci_high == pytest.approx(0.375 + math.hypot(one.ci_high - 0.75, other.ci_high) / 2)
    for bad in ({}, {"none": Rate(None, None, None, 0)}):
        with pytest.raises(ValueError, match="a mean needs at least one share, and a value of each"):
            mean_rate(bad)
