"""Gaps of layers against loops in float64, and the rule that reads the range against curves with known answers."""

import math

import numpy as np
import pytest

from jaxsafe.methods.layer_gaps import gap_curve, gap_layers, random_triples
from jaxsafe.model.layers import LayerRange


def angle(a, b):
    a, b = np.float64(a), np.float64(b)
    return math.degrees(math.acos(sum(a * b) / math.sqrt(sum(a * a) * sum(b * b))))


def test_the_gap_is_the_mean_over_triples_of_a_difference_of_angles():
    rng = np.random.default_rng(0)
    normal, malicious = (rng.standard_normal((n, 3, 5)).astype(np.float32) for n in (6, 4))
    found = gap_curve(normal, malicious, count=40, seed=3)
    triples = random_triples(6, 4, 40, 3)
    for layer in range(3):
        v, w = normal[:, layer], malicious[:, layer]
        each = [angle(v[i], w[m]) - angle(v[i], v[j]) for i, j, m in triples]
        assert found.gap[layer] == pytest.approx(sum(each) / 40, abs=1e-6)
        mixed = [math.cos(math.radians(angle(v[i], w[m]))) for i, _, m in triples]
        assert found.mixed[layer] == pytest.approx(sum(mixed) / 40, abs=1e-6)
    assert found.prompts == (6, 4) and found.triples == 40
    assert all(low < gap < high for low, gap, high in zip(found.low, found.gap, found.high, strict=True))


def test_kinds_at_a_right_angle_are_ninety_degrees_apart_without_any_spread():
    normal, malicious = np.zeros((5, 2, 3), np.float32), np.zeros((5, 2, 3), np.float32)
    normal[..., 0], malicious[:, 0, 0], malicious[:, 1, 1] = 2.0, 7.0, 3.0
    found = gap_curve(normal, malicious, count=20)
    assert found.normal == (1, 1) and found.malicious == (1, 1) and found.mixed == (1, 0)
    for curve in (found.gap, found.low, found.high):
        assert curve == pytest.approx((0, 90), abs=1e-9)
    assert found.layers == LayerRange(1, 2)


def test_the_interval_is_as_wide_as_prompts_and_not_as_pairs_make_it():
    """Half of the malicious prompts are at a right angle, half are as the normal ones: a share of `m` coins."""
    normal = np.tile(np.float32([1, 0]), (8, 1, 1))
    malicious = np.float32([[[1, 0]]] * 8 + [[[0, 1]]] * 8)
    found = gap_curve(normal, malicious, count=2000)
    spread = 90 * math.sqrt(0.25 / 16)  # of a mean of 16 coins, however many pairs are drawn
    assert found.high[0] - found.low[0] == pytest.approx(2 * 1.96 * spread, rel=0.1)


CURVES = [
    ([0, 0, 0, 1, 2, 3, 3, 3], (3, 6)),
    ([0, 0, 4, 8, 12, 12.9, 20], (2, 5)),  # what comes behind the first levelling-off does not count
    ([0, 1, 2, 3], (1, 4)),  # it never levels off
    ([5, 5, 5], (0, 1)),
    ([0, 0.5, 8, 9.8, 10], (2, 3)),  # 0.5 is below a tenth of the largest, and 1.8 below a quarter of 7.5
]


@pytest.mark.parametrize(("gap", "expected"), CURVES)
def test_the_range_is_from_appearance_to_levelling_off(gap, expected):
    curve = np.float64(gap)
    assert gap_layers(curve, curve - 1e-3) == LayerRange(*expected)


def test_a_gap_that_may_be_none_is_none():
    curve = np.float64([0, 1, 2, 3])
    assert gap_layers(curve, np.zeros(4)) is None
    assert gap_layers(-curve, -curve - 1) is None
    assert gap_layers(curve, np.float64([-1, -1, 1, 2])) == LayerRange(2, 4)


def test_triples_name_two_different_normal_prompts_evenly():
    triples = random_triples(3, 2, 6000, 1)
    assert (triples[:, 0] != triples[:, 1]).all()
    pairs, counts = np.unique(triples[:, :2], axis=0, return_counts=True)
    assert len(pairs) == 6 and np.abs(counts - 1000).max() < 150
    assert set(triples[:, 2]) == {0, 1}
    with pytest.raises(ValueError, match="1 normal and 2 malicious prompts make no triple"):
        random_triples(1, 2, 5, 0)
