"""Numbers from verdicts and scores. A rate has an interval and counts, a comparison on the same prompts a test.

A flag is True, False or None (could not be scored); what is unscored is left out of every number and counted.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, norm
from scipy.stats import t as student
from sklearn import metrics as sklearn_metrics

from jaxsafe.intervals import wilson
from jaxsafe.records.run import Difference, Rate
from jaxsafe.records.scans import ClassFigures, Classification, Curve

Flags = Iterable[bool | None]


@dataclass(frozen=True)
class Paired:
    """One condition against another on the same prompts, by the exact McNemar test.

    fixed: flags that were True and became False; broken: that were False and became True; p_value: two-sided,
    1 where no flag changed; n: pairs scored on both sides; n_unscored: other pairs.
    """

    fixed: int
    broken: int
    p_value: float
    n: int
    n_unscored: int


def rate(flags: Flags) -> Rate:
    """The share of True among the scored flags, with the Wilson score interval (Wilson 1927).

    Raises ValueError for anything but True, False and None.
    """
    checked = _checked(flags)
    scored = [f for f in checked if f is not None]
    n, unscored = len(scored), len(checked) - len(scored)
    if not n:
        return Rate(None, None, None, 0, unscored)
    return Rate(sum(scored) / n, *wilson(sum(scored) / n, n), n, unscored)


def mcnemar(before: Flags, after: Flags) -> Paired:
    """Compare flags of the same prompts, in the same order, where True marks a failure.

    The p-value is the two-sided binomial test of the discordant pairs (McNemar 1947, exact form). Raises
    ValueError for unequal lengths and for anything but True, False and None.
    """
    first, second = _checked(before), _checked(after)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} flags before and {len(second)} after; need one each a prompt")
    pairs = [(b, a) for b, a in zip(first, second, strict=True) if b is not None and a is not None]
    fixed, broken = pairs.count((True, False)), pairs.count((False, True))
    p_value = float(binomtest(fixed, fixed + broken, 0.5).pvalue) if fixed + broken else 1.0
    return Paired(fixed, broken, p_value, len(pairs), len(first) - len(pairs))


def scans_average(refused_safe: Flags, refused_unsafe: Flags) -> Rate:
    """Share of prompts treated rightly, (compliance on safe + refusal on unsafe) / all (arXiv 2408.11491, Avg.)."""
    complied = [None if refused is None else not refused for refused in _checked(refused_safe)]
    return rate(complied + _checked(refused_unsafe))


def classification(scores: ArrayLike, harmful: Iterable[bool], threshold: float) -> Classification:
    """Judge the verdicts `score >= threshold` (unsafe) against the labels.

    scores: [n] finite floats, higher for more harmful; harmful: [n] booleans. The AUPRC of a class is that of the score
    toward it. The interval of the AUROC is that of Hanley and McNeil (1982), Radiology 143:29. With one class only,
    AUROC, AUPRC and balanced accuracy are None. Raises ValueError for no scores, unequal lengths, scores or a
    threshold that are not finite, and labels that are not booleans.
    """
    s, unsafe = _scores_and_labels(scores, harmful)
    if not np.isfinite(threshold):
        raise ValueError(f"threshold {threshold} is not finite")
    called_unsafe = s >= threshold
    (tp, fn), (fp, tn) = sklearn_metrics.confusion_matrix(~unsafe, ~called_unsafe, labels=[True, False]).tolist()
    two = bool(unsafe.any() and not unsafe.all())
    area = float(sklearn_metrics.roc_auc_score(unsafe, s)) if two else None
    low, high = (None, None) if area is None else _area_interval(area, int(unsafe.sum()), int((~unsafe).sum()))
    return Classification(
        threshold=float(threshold),
        safe=_class_figures(~unsafe, -s, (tp, fp, fn)),
        harmful=_class_figures(unsafe, s, (tn, fn, fp)),
        auroc=area,
        auroc_low=low,
        auroc_high=high,
        balanced_accuracy=float(sklearn_metrics.balanced_accuracy_score(unsafe, called_unsafe)) if two else None,
        safe_as_safe=tp,
        safe_as_unsafe=fn,
        unsafe_as_safe=fp,
        unsafe_as_unsafe=tn,
    )


def _class_figures(members: np.ndarray, scores: np.ndarray, counts: tuple[int, int, int]) -> ClassFigures:
    """Figures of one class; `counts` are its members found, others taken for members, and members missed."""
    found, others, missed = counts
    two = bool(members.any() and not members.all())
    curve = sklearn_metrics.precision_recall_curve(members, scores) if two else None
    return ClassFigures(
        n=int(members.sum()),
        precision=_ratio(found, found + others),
        recall=_ratio(found, found + missed),
        f1=_ratio(2 * found, 2 * found + others + missed),
        auprc=float(sklearn_metrics.auc(curve[1], curve[0])) if curve else None,
    )


def _area_interval(area: float, m: int, n: int) -> tuple[float, float]:
    """The 95% interval of an area under a ROC over `m` and `n` members of both classes."""
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (m - 1) * (q1 - area**2) + (n - 1) * (q2 - area**2)) / (m * n)
    half = float(norm.ppf(0.975)) * math.sqrt(max(0.0, variance))
    return max(0.0, area - half), min(1.0, area + half)


def roc(scores: ArrayLike, harmful: Iterable[bool]) -> Curve:
    """The ROC of harmful against safe prompts.

    A point is the verdict `score >= threshold`; the first threshold is just above every score. Raises ValueError
    as `classification` does, and unless both classes are there.
    """
    s, unsafe = _scores_and_labels(scores, harmful)
    _need_both(unsafe)
    fpr, tpr, thresholds = sklearn_metrics.roc_curve(unsafe, s)
    thresholds[0] = np.nextafter(s.max(), np.inf)  # infinite as scikit-learn has it, which JSON cannot hold
    return Curve(tuple(fpr.tolist()), tuple(tpr.tolist()), tuple(thresholds.tolist()))


def best_threshold(scores: ArrayLike, harmful: Iterable[bool]) -> float:
    """The threshold of the highest balanced accuracy, for the verdict `score >= threshold` (unsafe).

    It lies in the middle of the gap between two neighbouring scores; among equally good gaps in the widest, then
    the lowest. Where every gap is worse than one verdict for all, it is the lowest score (all unsafe). Raises
    ValueError as `classification` does, and unless both classes are there.
    """
    s, unsafe = _scores_and_labels(scores, harmful)
    _need_both(unsafe)
    levels = np.unique(s)
    harmful_scores, safe_scores = np.sort(s[unsafe]), np.sort(s[~unsafe])
    caught = len(harmful_scores) - np.searchsorted(harmful_scores, levels)
    spared = np.searchsorted(safe_scores, levels)
    # Balanced accuracy times twice both class sizes, in integers: ties are exact.
    merit = caught * len(safe_scores) + spared * len(harmful_scores)
    gaps = np.diff(levels, prepend=levels[0])
    best = max(range(len(levels)), key=lambda i: (merit[i], gaps[i], -i))
    if best == 0:
        return float(levels[0])
    middle = levels[best - 1] / 2 + levels[best] / 2
    return float(middle if middle > levels[best - 1] else levels[best])


def _checked(flags: Flags) -> list[bool | None]:
    checked: list[bool | None] = []
    for i, flag in enumerate(flags.tolist() if hasattr(flags, "tolist") else flags):
        if flag is not None and not isinstance(flag, bool | np.bool_):
            raise ValueError(f"flag {i} is {flag!r}; need True, False or None")
        checked.append(None if flag is None else bool(flag))
    return checked


def _scores_and_labels(scores: ArrayLike, harmful: Iterable[bool]) -> tuple[np.ndarray, np.ndarray]:
    s = np.asarray(scores, dtype=np.float64)
    labels: list[Any] = _checked(harmful)
    if s.ndim != 1 or not s.size or len(s) != len(labels):
        raise ValueError(f"scores of shape {s.shape} and {len(labels)} labels; need one each a prompt, at least one")
    if not np.isfinite(s).all():
        bad = int(np.flatnonzero(~np.isfinite(s))[0])
        raise ValueError(f"score {bad} is {s[bad]}; need finite scores")
    if None in labels:
        raise ValueError(f"label {labels.index(None)} is None; need True (harmful) or False (safe)")
    return s, np.asarray(labels, dtype=bool)


def _need_both(unsafe: np.ndarray) -> None:
    if unsafe.all() or not unsafe.any():
        raise ValueError(f"all {len(unsafe)} prompts are {'harmful' if unsafe.all() else 'safe'}; need both classes")


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def clustered_rate(groups: Sequence[Sequence[bool | None]]) -> Rate:
    """The share of True among all scored flags; the flags of one group (the samples of a prompt) may be alike.

    The 95% interval is Wilson's at the effective number of flags n / deff. The design effect deff is the variance of
    the share between groups (the linearised one of a ratio) over that of n independent flags, at least 1: it is 1
    where flags of a group are independent and the group's size where they are equal. Where all flags are alike deff
    cannot be estimated, and each group counts as one flag. Source: Kish, Survey Sampling (1965), for deff; Franco et
    al., J. Survey Stat. Methodol. 7 (2019) 334, for Wilson's interval at the effective sample size.

    n, n_unscored: flags, not groups. Raises ValueError for anything but True, False and None.
    """
    flat = rate(flag for group in groups for flag in group)
    if flat.value is None:
        return flat
    p, n = flat.value, flat.n
    if 0 < p < 1:
        effective = n / max(1.0, _share_variance(groups) * n / (p * (1 - p)))
    else:
        effective = sum(any(flag is not None for flag in group) for group in groups)
    return Rate(p, *wilson(p, effective), n, flat.n_unscored)


def mean_rate(rates: Mapping[str, Rate]) -> Rate:
    """The unweighted mean of independent shares with its 95% interval; `n` counts all their prompts.

    The interval puts the shares' own Wilson limits together (Zou, Huang and Zhang 2009, Computational Statistics
    and Data Analysis 53:1080). Raises ValueError for no shares and for one without a value.
    """
    shares = list(rates.values())
    if not shares or any(share.value is None for share in shares):
        raise ValueError(f"a mean needs at least one share, and a value of each; got {dict(rates)}")
    values, lows, highs = np.array([(share.value, share.ci_low, share.ci_high) for share in shares]).T
    mean, k = float(values.mean()), len(shares)
    below, above = (math.hypot(*(values - lows)) / k, math.hypot(*(highs - values)) / k)
    return Rate(mean, mean - below, mean + above, sum(share.n for share in shares), 0)


SeedFlags = Sequence[Sequence[bool | None]]
"""[seed][answer]: verdicts on the same prompts in the same order, by seed."""


def pooled(flags: SeedFlags) -> Rate:
    """The mean rate over seeds with its 95% interval over prompts and over seeds; a single seed's is Wilson's.

    Seeds (draws of a random control, training runs) cross prompts as readers cross cases, and both count as drawn. The
    variance of the mean is that of the seeds' rates over their number, plus the covariance of two seeds' rates on the
    same prompts (Obuchowski and Rockette 1995, Communications in Statistics 24:285), and at least that of
    `clustered_rate`; the t quantile has the degrees of freedom of Hillis (2007, Statistics in Medicine 26:596).
    Wilson's interval at the effective sample size that follows (Korn and Graubard 1998, Survey Methodology 24:193)
    keeps to [0, 1]. Where all flags are alike the seeds say nothing of their spread, and it is that of the prompts.
    """
    if len(flags) == 1:
        return rate(flags[0])
    return pooled_answers([[[flag] for flag in seed] for seed in flags])


def pooled_answers(verdicts: Sequence[Sequence[Sequence[bool | None]]]) -> Rate:
    """As `pooled`, of verdicts [seed][prompt][answer]; a single seed's is that of `clustered_rate`."""
    given = clustered_rate(_by_prompt(verdicts))
    p = given.value
    if len(verdicts) == 1 or p is None or not 0 < p < 1:
        return given
    variance, degrees = _variance(verdicts, p, given.n)
    effective = p * (1 - p) / variance * (norm.ppf(0.975) / student.ppf(0.975, degrees)) ** 2
    return Rate(p, *wilson(p, float(effective)), given.n, given.n_unscored)


def _variance(verdicts: Sequence[Sequence[Sequence[bool | None]]], p: float, n: int) -> tuple[float, float]:
    """Variance of the mean `p` of `n` scored flags over seeds and prompts, and its degrees of freedom."""
    of_prompts = max(_share_variance(_by_prompt(verdicts)), p * (1 - p) / n)
    scored = [seed for seed in verdicts if rate(flag for prompt in seed for flag in prompt).n]
    seeds = len(scored)
    if seeds == 1:
        return of_prompts, math.inf
    shares = np.array([rate(flag for prompt in seed for flag in prompt).value for seed in scored], float)
    drawn = float(shares.var(ddof=1)) / seeds
    own = float(np.mean([_share_variance(seed) for seed in scored]))
    shared = max(0.0, (seeds * _share_variance(_by_prompt(verdicts)) - own) / (seeds - 1))
    variance = max(drawn + shared, of_prompts)
    return variance, (seeds - 1) * (variance / drawn) ** 2 if drawn else math.inf


def _share_variance(groups: Sequence[Sequence[bool | None]]) -> float:
    """Variance of the share of True among scored flags in groups, the linearised one of a ratio."""
    scored = [group for group in ([flag for flag in each if flag is not None] for each in groups) if group]
    n = sum(map(len, scored))
    p = sum(map(sum, scored)) / n
    return float(sum((sum(group) - p * len(group)) ** 2 for group in scored)) / n**2


def _by_prompt(verdicts: Sequence[Sequence[Sequence[bool | None]]]) -> list[list[bool | None]]:
    return [[flag for answers in prompt for flag in answers] for prompt in zip(*verdicts, strict=True)]


def difference(first: SeedFlags, second: SeedFlags) -> Difference:
    """By how much the rate of `second` is above that of `first`, on the same prompts, with a 95% interval.

    Square-and-add of both intervals of `pooled`, less what both share: the correlation of the prompts' means times the
    intervals over prompts alone (Newcombe 1998, method 10, here with clusters and seeds). None where one of both has no
    scored flag.
    """
    a, b = _arms(first), _arms(second)
    if a is None or b is None:
        return Difference(None, None, None)
    r = max(0.0, _correlation(_means(first), _means(second)))
    d = b.value - a.value
    return Difference(d, d - _span(b.below, a.above, r), d + _span(b.above, a.below, r))


@dataclass(frozen=True)
class _Arms:
    """A share, and how far its interval goes below and above it: in all, and over prompts alone."""

    value: float
    below: tuple[float, float]
    above: tuple[float, float]


def _arms(flags: SeedFlags) -> _Arms | None:
    both = pooled(flags), rate(flags[0]) if len(flags) == 1 else clustered_rate(list(zip(*flags, strict=True)))
    value = both[0].value
    if value is None:
        return None
    below = [value - float(each.ci_low or 0.0) for each in both]
    above = [float(each.ci_high or 0.0) - value for each in both]
    return _Arms(value, (below[0], below[1]), (above[0], above[1]))


def _span(x: tuple[float, float], y: tuple[float, float], r: float) -> float:
    return math.sqrt(max(0.0, x[0] ** 2 + y[0] ** 2 - 2 * r * x[1] * y[1]))


def _means(flags: SeedFlags) -> np.ndarray:
    columns = [[f for f in column if f is not None] for column in zip(*flags, strict=True)]
    return np.array([np.mean(column) if column else math.nan for column in columns])


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() < 2 or np.ptp(x[known]) == 0 or np.ptp(y[known]) == 0:
        return 0.0
    return float(np.corrcoef(x[known], y[known])[0, 1])
