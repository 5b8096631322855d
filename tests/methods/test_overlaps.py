"""Overlaps of attributions against loops in float64 and cases whose answers are known."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import betainc
from tiny import tiny_config, tiny_params

from jaxsafe.kernels.lowrank import Basis
from jaxsafe.kernels.selection import random_scores, top
from jaxsafe.kernels.units import Units
from jaxsafe.methods.overlaps import (
    PATHS,
    Parts,
    along,
    by_layer,
    captured,
    inside,
    layer_jaccard,
    leading,
    located,
    outside,
    overlaps,
    unit_weights,
)
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.weights import flatten, linear_maps, nest

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
D = CONFIG.embed


def orthonormal(rng, columns):
    return np.linalg.qr(rng.standard_normal((CONFIG.layers, D, columns)))[0]


def spans(seed, columns):
    rng = np.random.default_rng(seed)
    return {path: orthonormal(rng, columns) for path in PATHS}


def weights(fraction, seed=0):
    return top(CONFIG, random_scores(CONFIG, seed), fraction)


def some_units(seed=0, share=0.2):
    rng = np.random.default_rng(seed)
    return Units(rng.random((CONFIG.layers, CONFIG.heads)) < 2 * share, rng.random((CONFIG.layers, CONFIG.mlp)) < share)


def no_units():
    return Units(np.zeros((CONFIG.layers, CONFIG.heads), bool), np.zeros((CONFIG.layers, CONFIG.mlp), bool))


def slow_captured(mask, span):
    out = []
    for layer in range(CONFIG.layers):
        found = whole = 0.0
        for path in PATHS:
            W = np.float64(flatten(PARAMS)[path])[layer].reshape(-1, D)
            M = np.asarray(flatten(mask)[path])[layer].reshape(-1, D)
            for w, m in zip(W, M, strict=True):
                row = np.where(m, w, 0)
                whole += row @ row
                found += sum((row @ v) ** 2 for v in span[path][layer].T)
        out.append(found / whole)
    return out


def test_captured_energy_is_that_of_a_loop_over_rows():
    mask, span = weights(0.1), spans(1, 5)
    narrow = {path: jnp.asarray(each, jnp.float32) for path, each in span.items()}
    np.testing.assert_allclose(captured(CONFIG, PARAMS, mask, narrow), slow_captured(mask, span), rtol=1e-5)
    whole = {path: jnp.asarray(np.tile(np.eye(D, dtype=np.float32), (CONFIG.layers, 1, 1))) for path in PATHS}
    np.testing.assert_allclose(captured(CONFIG, PARAMS, mask, whole), 1, rtol=1e-5)
    assert np.isnan(captured(CONFIG, PARAMS, weights(0.0), narrow)).all()


def test_the_jaccard_index_of_a_layer_counts_all_its_maps():
    a, b = weights(0.3), weights(0.2, seed=1)
    for layer, found in enumerate(layer_jaccard(a, b)):
        pairs = [
            (np.asarray(flatten(a)[p])[layer].ravel(), np.asarray(flatten(b)[p])[layer].ravel()) for p in flatten(a)
        ]
        first, second = (np.concatenate(each) for each in zip(*pairs, strict=True))
        assert found == len(set(np.flatnonzero(first)) & set(np.flatnonzero(second))) / (first | second).sum()
    assert (layer_jaccard(a, a) == 1).all() and np.isnan(layer_jaccard(weights(0.0), weights(0.0))).all()


def test_units_own_their_rows_and_columns():
    units = no_units()
    units.neurons[1, [3, 5]] = True
    mask = unit_weights(CONFIG, units)
    assert flatten(mask).keys() == linear_maps(CONFIG).keys()
    assert sum(by_layer(each) for each in flatten(mask).values()).tolist() == [0, 2 * 3 * D, 0]


def basis(vectors):
    return Basis(jnp.asarray(vectors, jnp.float32), jnp.ones(vectors.shape[::2]))


def test_ranks_outside_utility_are_orthogonal_to_it_and_span_what_is_left():
    safety, utility = (spans(seed, 6) for seed in (2, 3))
    trees = [nest({path: basis(each) for path, each in tree.items()}) for tree in (safety, utility)]
    found = outside(*trees, dict.fromkeys(PATHS, (3, 5)))
    for path, layer in itertools.product(PATHS, range(CONFIG.layers)):
        V, U, S = found[path][layer], utility[path][layer, :, :5], safety[path][layer, :, :3]
        np.testing.assert_allclose(V.T @ V, np.eye(3), atol=1e-6)
        np.testing.assert_allclose(U.T @ V, 0, atol=1e-6)
        left = S - U @ (U.T @ S)
        np.testing.assert_allclose(V @ (V.T @ left), left, atol=1e-6)
    same = outside(trees[0], trees[0], dict.fromkeys(PATHS, (3, 3)))
    assert all((each == 0).all() for each in same.values())
    first = leading(trees[1], dict.fromkeys(PATHS, 2))
    np.testing.assert_allclose(first[PATHS[0]], utility[PATHS[0]][:, :, :2], atol=1e-7)


def test_a_direction_in_a_span_is_captured_whole_and_one_across_it_not_at_all():
    span = spans(4, 4)[PATHS[0]]
    held, across = span[:, :, 1], np.linalg.svd(span)[0][:, :, -1]
    mixed = (held + 2 * across) / np.sqrt(5)
    for direction, expected in ((held, 1), (across, 0), (mixed, 0.2)):
        found = along("ranks", direction, span)
        np.testing.assert_allclose(found.values, expected, atol=1e-9)
        assert found.chance == (4 / D,) * CONFIG.layers and found.exact
    # The 95% range is that of the squared sines and cosines of uniformly random directions.
    assert betainc(2, (D - 4) / 2, found.low[0]) == pytest.approx(0.025, abs=1e-9)
    assert betainc(2, (D - 4) / 2, found.high[0]) == pytest.approx(0.975, abs=1e-9)
    drawn = np.random.default_rng(0).standard_normal((4000, D))
    share = np.square(drawn @ span[0]).sum(-1) / np.square(drawn).sum(-1)
    assert np.mean((share > found.low[0]) & (share < found.high[0])) == pytest.approx(0.95, abs=0.015)


def parts(mask, units):
    line = {path: span[:, :, 0] for path, span in spans(6, 1).items()}
    return Parts(mask, units, spans(5, 3), spans(7, 3), line)


def test_every_pair_is_held_against_random_parts_of_its_size():
    done = []
    found = overlaps(CONFIG, PARAMS, parts(weights(0.1), some_units()), 12, 0, done.append)
    pairs = [(each.first, each.second) for each in found]
    assert pairs == [
        ("weights", "units"),
        ("weights", "ranks"),
        ("units", "ranks"),
        ("weights", "direction"),
        ("units", "direction"),
        *((f"{name} of {path[7:]}", "direction") for name in ("ranks", "utility ranks") for path in PATHS),
    ]
    assert sum(done) == 24
    for each in found:
        assert each.draws == (0 if each.exact else 12)
        for low, chance, high in zip(each.low, each.chance, each.high, strict=True):
            assert low <= chance <= high
    # Random masks: independent of units, and of any direction but for the weights' own.
    jaccard, ranks = found[0], found[1]
    size, other = 0.1, unit_weights(CONFIG, some_units())
    shares = sum(map(by_layer, flatten(other).values())) / sum(leaf[0].size for leaf in flatten(other).values())
    np.testing.assert_allclose(jaccard.chance, size * shares / (size + shares - size * shares), rtol=0.05)
    np.testing.assert_allclose(ranks.chance, 3 / D, rtol=0.35)


def test_units_that_are_the_weights_stand_out():
    units = some_units(share=0.1)
    jaccard = overlaps(CONFIG, PARAMS, parts(unit_weights(CONFIG, units), units), 5, 0)[0]
    assert set(jaccard.values) == {1.0} and max(jaccard.high) < 1


def test_a_part_without_weights_overlaps_with_nothing():
    found = overlaps(CONFIG, PARAMS, parts(weights(0.1), no_units()), 2, 0)
    assert set(found[0].values) == {0.0} and set(found[2].values) == {None} == set(found[4].values)
    assert [each.part for each in located(CONFIG, parts(weights(0.1), no_units()), LayerRange(0, 2))] == ["weights"]


def test_the_share_in_a_range_stands_beside_every_range_of_its_length():
    counts = np.float64([1, 1, 6, 2, 0])
    found = inside("units", counts, LayerRange(2, 4))
    assert (found.part, found.share, found.chance, found.beyond) == ("units", 0.8, pytest.approx(1.9 / 4), 1 / 4)
    assert inside("units", counts, LayerRange(0, 5)).beyond == 1
