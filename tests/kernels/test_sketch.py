"""Sketches tell how far two models are apart, by rounding, by a small change, on a mesh, and by everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, tiny_params

from jaxsafe.kernels.sketch import distance, sketch
from jaxsafe.model.weights import flatten, nest


def changed(params, by, only=None):
    """`params` with noise of `by` times the norm of each weight (of one, where it is named)."""
    rng = np.random.default_rng(3)
    out = {}
    for path, weight in flatten(params).items():
        noise = rng.standard_normal(weight.shape).astype(np.float32)
        scale = by if only in (None, path) else 0.0
        out[path] = weight + scale * noise * np.linalg.norm(weight) / np.linalg.norm(noise)
    return nest(out)


@pytest.fixture(scope="module")
def params():
    return tiny_params(tiny_config())


def test_the_same_weights_have_no_distance_and_rounded_ones_little(params):
    mine = sketch(params)
    assert distance(mine, sketch(params)) == 0
    rounded = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), params)
    assert 0.0008 < distance(mine, sketch(rounded)) < 0.0025
    widened = jax.tree.map(lambda weight: weight.astype(jnp.float32), rounded)
    assert distance(sketch(rounded), sketch(widened)) < 1e-5


@pytest.mark.parametrize("by", [0.02, 0.2])
def test_the_distance_is_that_of_the_weights(params, by):
    assert distance(sketch(params), sketch(changed(params, by))) == pytest.approx(by, rel=0.3)


def test_a_change_of_one_weight_is_seen(params):
    names = list(flatten(params))
    found = distance(sketch(params), sketch(changed(params, 0.1, only="layers/q")))
    assert found == pytest.approx(0.1 / np.sqrt(len(names)), rel=0.6)


def test_other_models_are_far_apart(params):
    other = tiny_params(tiny_config(), seed=5)
    assert distance(sketch(params), sketch(other)) > 0.5
    with pytest.raises(ValueError, match="as 'x'"):
        distance({"x": [1.0, 1.0]}, {})
    assert distance({"x": [0.0, 0.0]}, {"x": [0.0, 0.0]}) == 0 < distance({"x": [0.0, 0.0]}, {"x": [1.0, 1.0]})
