"""Directions through the weights against NumPy in float64, tensor by tensor as the checkpoint holds them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, tiny_params

from jaxsafe.kernels.directions import difference, moved, moved_stack, orthogonal, random_direction
from jaxsafe.model.weights import hf_view, shardings
from jaxsafe.parallel import parse_mesh

CONFIG = tiny_config(qkv_bias=True)
THETA = tiny_params(CONFIG)


def tensors(tree):
    """By the names of the checkpoint, float64, maps as [out, in]."""
    return {name: np.asarray(tensor, np.float64) for name, tensor in hf_view(CONFIG, tree).items()}


def leaves_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def direction():
    return random_direction(CONFIG, THETA, 0)


def test_each_tensor_has_the_norm_of_its_weights_and_norms_stay(direction):
    weights, drawn = tensors(THETA), tensors(direction)
    assert drawn.keys() == weights.keys()
    for name, tensor in drawn.items():
        if "norm" in name:
            assert not tensor.any()
        else:
            assert np.linalg.norm(tensor) == pytest.approx(np.linalg.norm(weights[name]), rel=1e-5)
    assert drawn["model.embed_tokens.weight"].any() and drawn["model.layers.0.self_attn.q_proj.bias"].any()


def test_directions_are_gaussian_and_follow_from_the_seed(direction):
    assert leaves_equal(direction, random_direction(CONFIG, THETA, 0))
    flat = tensors(direction)["model.embed_tokens.weight"].ravel()
    z = flat / flat.std()
    # 9,600 draws: a kurtosis of 3 has a standard error of 0.05, a mean of 0 one of 0.01.
    assert abs(z.mean()) < 0.04 and np.mean(z**4) == pytest.approx(3, abs=0.2)
    other, mine = tensors(random_direction(CONFIG, THETA, 1)), tensors(direction)
    pairs = [(mine[name], other[name]) for name in mine if mine[name].size > 500]
    pairs.append((mine["model.layers.0.mlp.up_proj.weight"], mine["model.layers.1.mlp.up_proj.weight"]))
    for a, b in pairs:
        cosine = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        assert abs(cosine) < 5 / np.sqrt(a.size)


def test_per_filter_each_row_of_the_checkpoint_has_the_norm_of_its_weights():
    weights, drawn = tensors(THETA), tensors(random_direction(CONFIG, THETA, 0, "filter"))
    for name, tensor in drawn.items():
        if "norm" in name:
            assert not tensor.any()
        elif tensor.ndim == 2:
            want = np.linalg.norm(weights[name], axis=1)
            np.testing.assert_allclose(np.linalg.norm(tensor, axis=1), want, rtol=1e-5)
        else:
            assert np.linalg.norm(tensor) == pytest.approx(np.linalg.norm(weights[name]), rel=1e-5)


def test_nothing_is_skipped_where_norms_move_too(direction):
    drawn = tensors(random_direction(CONFIG, THETA, 0, skip=()))
    assert all(tensor.any() for tensor in drawn.values())
    name = "model.layers.1.mlp.down_proj.weight"
    assert np.array_equal(drawn[name], tensors(direction)[name])


def test_another_normalisation_is_refused():
    with pytest.raises(ValueError, match="per layer or filter, got 'row'"):
        random_direction(CONFIG, THETA, 0, "row")


def test_orthogonal_is_gram_schmidt_in_every_tensor(direction):
    second = random_direction(CONFIG, THETA, 1)
    turned = tensors(orthogonal(CONFIG, second, direction))
    for name, d in tensors(second).items():
        if "norm" in name:
            assert not turned[name].any()
            continue
        t = tensors(direction)[name]
        rest = d - np.vdot(d, t) / np.vdot(t, t) * t
        want = rest / np.linalg.norm(rest) * np.linalg.norm(d)
        np.testing.assert_allclose(turned[name], want, atol=3e-6 * np.abs(want).max())


def test_moved_is_the_weights_plus_steps(direction):
    second = random_direction(CONFIG, THETA, 1)
    there = tensors(moved(THETA, (direction, second), jnp.array([0.3, -0.2])))
    first, other = tensors(direction), tensors(second)
    for name, weight in tensors(THETA).items():
        want = weight + np.float32(0.3) * first[name] + np.float32(-0.2) * other[name]
        np.testing.assert_allclose(there[name], want, atol=5e-7 * max(1, np.abs(want).max()))
    assert leaves_equal(moved(THETA, (direction,), jnp.zeros(1)), THETA)


def test_half_precision_is_summed_in_float32(direction):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), THETA)
    there = moved(half, (direction,), jnp.array([0.37]))
    for a, b, d in zip(*map(jax.tree.leaves, (there, half, direction)), strict=True):
        want = (b.astype(jnp.float32) + jnp.float32(0.37) * d).astype(jnp.bfloat16)
        assert a.dtype == jnp.bfloat16 and np.array_equal(a, want)


def test_points_in_one_tree_are_those_of_one_each(direction):
    offsets = np.array([[-0.5], [0.0], [0.25]], np.float32)
    stack = moved_stack(THETA, (direction,), offsets)
    for place, offset in enumerate(offsets):
        one = moved(THETA, (direction,), offset)
        assert leaves_equal(jax.tree.map(lambda a, place=place: a[place], stack), one)


def test_the_line_to_another_model_ends_there():
    other = tiny_params(CONFIG, 1)
    way = difference(THETA, other)
    assert leaves_equal(moved(THETA, (way,), jnp.zeros(1)), THETA)
    half, there = (tensors(moved(THETA, (way,), jnp.array([t]))) for t in (0.5, 1.0))
    a, b = tensors(THETA), tensors(other)
    for name in a:
        np.testing.assert_allclose(there[name], b[name], atol=1e-6)
        np.testing.assert_allclose(half[name], (a[name] + b[name]) / 2, atol=1e-6)


def test_directions_are_the_same_on_a_mesh(direction):
    mesh = parse_mesh("data:2,model:4")
    divided = jax.device_put(THETA, shardings(CONFIG, mesh))
    drawn = random_direction(CONFIG, divided, 0)
    for a, b, weight in zip(*map(jax.tree.leaves, (drawn, direction, divided)), strict=True):
        assert a.sharding.is_equivalent_to(weight.sharding, a.ndim)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_tied_embeddings_are_one_tensor():
    tied = dataclasses.replace(CONFIG, tied=True)
    params = tiny_params(tied)
    assert "unembed" not in random_direction(tied, params, 0)
