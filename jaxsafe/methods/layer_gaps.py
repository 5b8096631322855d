"""Where a model tells malicious prompts from normal ones: cosine gaps by layer (Li et al., arXiv 2408.17003, sec. 3.2).

Of states v at a prompt's last token, after every block, over triples of a normal prompt n, another n' and a malicious
m:

    gap = mean( angle(v_n, v_m) - angle(v_n, v_n') )

Published: 500 random pairs, and the range of layers is read off the curve by eye, from where the gap appears to where
it first levels off. Ours: the rule that reads it (`gap_layers`), and an interval over prompts rather than pairs, since
a prompt is in many pairs. Otherwise than published, prompts stand in the model's own template, not in Alpaca's, and the
last layer's state is taken before the final norm.

n normal prompts, m malicious prompts, L layers, D embed, R triples, S resamples
"""

import numpy as np
from jaxtyping import Float, Int

from jaxsafe.model.layers import LayerRange
from jaxsafe.records.anatomy import Gap

ONSET = 0.1
"""The gap has appeared where its interval lies above zero and it is above this share of its largest value."""
FLAT = 0.25
"""It has levelled off where it rises by less than this share of its steepest rise since it appeared."""


def gap_layers(gap: Float[np.ndarray, " L"], low: Float[np.ndarray, " L"]) -> LayerRange | None:
    """The range from the first layer where the gap has appeared to the first where it levels off; None for no gap.

    The rule is ours (see `ONSET` and `FLAT`): the last layer is the one behind which the gap rises by less than `FLAT`
    of its steepest rise since it appeared. low: the lower ends of the intervals.
    """
    open_layers = np.flatnonzero((low > 0) & (gap > ONSET * gap.max()))
    if not len(open_layers):
        return None
    first = int(open_layers[0])
    rises = np.diff(gap, prepend=0.0)
    steepest = np.maximum.accumulate(rises[first:])
    flat = np.flatnonzero(rises[first + 1 :] < FLAT * steepest[:-1])
    return LayerRange(first, first + 1 + int(flat[0]) if len(flat) else len(gap))


def random_triples(n: int, m: int, count: int, seed: int) -> Int[np.ndarray, "R 3"]:
    """Rows of a normal prompt, another normal prompt and a malicious one, uniformly at random.

    Raises ValueError for fewer than two normal prompts and for no malicious one.
    """
    if n < 2 or m < 1:
        raise ValueError(f"{n} normal and {m} malicious prompts make no triple; need at least 2 and 1")
    rng = np.random.default_rng(seed)
    first, step, harmful = rng.integers(n, size=count), rng.integers(1, n, size=count), rng.integers(m, size=count)
    return np.stack([first, (first + step) % n, harmful], axis=1)


def gap_curve(
    normal: Float[np.ndarray, "n L D"],
    malicious: Float[np.ndarray, "m L D"],
    count: int = 500,
    seed: int = 0,
    resamples: int = 1000,
) -> Gap:
    """The gap over `count` random triples, with the 2.5% and 97.5% quantiles over resampled prompts.

    A resample weighs each triple by how often its three prompts were drawn. Raises ValueError as `random_triples` does.
    """
    n, m = len(normal), len(malicious)
    triples = random_triples(n, m, count, seed)
    others = random_triples(m, n, count, seed + 1)[:, :2] if m > 1 else np.zeros((1, 2), int)
    v, w = _unit(normal), _unit(malicious)
    same, mixed = _cosines(v[triples[:, 0]], v[triples[:, 1]]), _cosines(v[triples[:, 0]], w[triples[:, 2]])
    differences = np.degrees(np.arccos(mixed) - np.arccos(same))
    rng = np.random.default_rng([seed, 2])
    of_normal, of_malicious = (rng.multinomial(k, np.full(k, 1 / k), size=resamples) for k in (n, m))
    weights = of_normal[:, triples[:, 0]] * of_normal[:, triples[:, 1]] * of_malicious[:, triples[:, 2]]
    weights = weights[weights.sum(1) > 0]
    drawn = weights @ differences / weights.sum(1, keepdims=True)
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    gap = differences.mean(0)
    harmful = _cosines(w[others[:, 0]], w[others[:, 1]])
    return Gap(
        _plain(same.mean(0)),
        _plain(harmful.mean(0)),
        _plain(mixed.mean(0)),
        _plain(gap),
        _plain(low),
        _plain(high),
        (n, m),
        count,
        gap_layers(gap, low),
    )


def _unit(states: Float[np.ndarray, "n L D"]) -> Float[np.ndarray, "n L D"]:
    wide = states.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-300)


def _plain(curve: Float[np.ndarray, " L"]) -> tuple[float, ...]:
    return tuple(map(float, curve))


def _cosines(a: Float[np.ndarray, "R L D"], b: Float[np.ndarray, "R L D"]) -> Float[np.ndarray, "R L"]:
    return np.clip(np.einsum("rld,rld->rl", a, b), -1, 1)
