"""What is frozen keeps its bits under AdamW with weight decay, and all the rest moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_config, tiny_params

from jaxsafe.kernels.freezing import freeze, layers, outside, rewind
from jaxsafe.model.weights import flatten, linear_maps, nest

CONFIG = tiny_config(layers=4)
MAPS = list(linear_maps(CONFIG))
OUTPUTS = {"q": 32, "k": 16, "v": 16, "o": 32, "gate": 48, "up": 48, "down": 32}


@pytest.fixture(scope="module")
def params():
    return tiny_params(CONFIG)


def bits(a):
    return np.asarray(a).view(np.uint32)


def random_mask(params, paths, seed=0):
    rng = np.random.default_rng(seed)
    return nest({path: rng.random(flatten(params)[path].shape) < 0.4 for path in paths})


def random_bases(rank, paths=MAPS, seed=0):
    rng = np.random.default_rng(seed)
    draws = {path: rng.standard_normal((CONFIG.layers, OUTPUTS[path.split("/")[1]], rank)) for path in paths}
    return nest({path: np.linalg.qr(draw)[0].astype(np.float32) for path, draw in draws.items()})


def trained(params, frozen, steps=3):
    """AdamW on random gradients, with weight decay."""
    optimizer = optax.chain(optax.adamw(1e-2, weight_decay=0.1), frozen)
    state, rng = optimizer.init(params), np.random.default_rng(5)
    for _ in range(steps):
        gradient = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), params)
        with jax.numpy_dtype_promotion("standard"):  # optax takes powers of integer counts
            updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_masked_weights_keep_their_bits_and_the_rest_moves(params):
    mask = flatten(random_mask(params, ["layers/q", "layers/down", "layers/mlp_norm", "embed"]))
    before = flatten(params)
    before["layers/down"] = jnp.where(mask["layers/down"], -0.0, before["layers/down"])
    after = flatten(trained(nest(before), freeze(nest(mask))))
    for path, weight in before.items():
        stays = mask.get(path, np.zeros(weight.shape, bool))
        np.testing.assert_array_equal(bits(after[path])[stays], bits(weight)[stays])
        assert (bits(after[path])[~stays] != bits(weight)[~stays]).mean() > 0.99, path


def test_the_free_weights_move_as_without_a_mask(params):
    mask = random_mask(params, MAPS)
    ours, whole = flatten(trained(params, freeze(mask))), flatten(trained(params, optax.identity()))
    for path, weight in whole.items():
        free = ~flatten(mask)[path] if path in MAPS else np.ones(weight.shape, bool)
        np.testing.assert_array_equal(np.asarray(ours[path])[free], np.asarray(weight)[free])


def test_updates_are_projected_out_of_the_subspace(params):
    bases, rng = random_bases(5), np.random.default_rng(1)
    updates = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), params)
    frozen = outside(bases)
    ours, _ = frozen.update(updates, frozen.init(params))
    for path, update in flatten(updates).items():
        if path not in MAPS:
            np.testing.assert_array_equal(flatten(ours)[path], update)
            continue
        for layer in range(CONFIG.layers):
            U = flatten(bases)[path][layer].astype(np.float64)
            rows = update[layer].reshape(-1, len(U)).astype(np.float64)
            kept = np.stack([row - U @ (U.T @ row) for row in rows])
            np.testing.assert_allclose(flatten(ours)[path][layer].reshape(kept.shape), kept, atol=2e-6)


def test_training_outside_a_subspace_leaves_the_part_inside_it(params):
    paths = ["layers/q", "layers/o", "layers/gate", "layers/down"]
    bases = random_bases(7, paths)
    after, before = flatten(trained(params, outside(bases), steps=10)), flatten(params)
    for path, weight in before.items():
        assert float(jnp.abs(after[path] - weight).max()) > 0.05, path
        if path in paths:
            U = flatten(bases)[path].astype(np.float64)
            moved = np.asarray(after[path] - weight, np.float64).reshape(CONFIG.layers, -1, U.shape[1])
            assert np.abs(moved @ U).max() < 3e-6
            rest = random_bases(7, paths, seed=9)
            assert np.abs(moved @ flatten(rest)[path]).max() > 0.01


def test_only_the_chosen_layers_move(params):
    params = {**params, "embed": params["embed"].at[:, 0].set(-0.0)}
    after, before = flatten(trained(params, layers(range(1, 3)))), flatten(params)
    for path, weight in before.items():
        if not path.startswith("layers/"):
            np.testing.assert_array_equal(bits(after[path]), bits(weight))
            continue
        for layer in range(4):
            same = bits(after[path][layer]) == bits(weight[layer])
            assert same.all() if layer in (0, 3) else same.mean() < 0.01, (path, layer)


def test_the_callers_mask_and_bases_outlive_donation(params):
    masks, bases = (jax.tree.map(jnp.asarray, tree) for tree in (random_mask(params, MAPS), random_bases(2)))
    for frozen in (freeze(masks), outside(bases)):
        jax.jit(lambda state: jax.tree.map(lambda a: ~a if a.dtype == bool else -a, state), donate_argnums=0)(
            frozen.init(params)
        )
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((masks, bases)))


def test_rewinding_takes_the_original_where_the_mask_is_true(params):
    tuned, mask = tiny_params(CONFIG, seed=1), random_mask(params, ["layers/v", "embed"])
    out = flatten(rewind(tuned, params, mask))
    for path, weight in out.items():
        part = flatten(mask).get(path, np.zeros(weight.shape, bool))
        expected = np.array(flatten(tuned)[path])
        expected[part] = np.asarray(flatten(params)[path])[part]
        np.testing.assert_array_equal(bits(weight), bits(expected))
    jax.tree.map(np.testing.assert_array_equal, rewind(tuned, params, {}), tuned)


@pytest.mark.parametrize(
    ("frozen", "words"),
    [
        (freeze({"layers": {"z": np.ones((4, 3), bool)}}), ["'layers/z'", "layers/q"]),
        (freeze({"embed": np.ones((300, 31), bool)}), ["'embed'", "(300, 31)", "(300, 32)"]),
        (outside({"layers": {"q": np.ones((4, 31, 2))}}), ["'layers/q'", "(4, 31, 2)"]),
        (outside({"layers": {"q": np.ones((3, 32, 2))}}), ["'layers/q'", "(3, 32, 2)"]),
        (outside({"layers": {"z": np.ones((3, 32, 2))}}), ["'layers/z'"]),
        (layers(range(2, 5)), ["layer 4", "0 to 3"]),
    ],
)
def test_what_does_not_fit_is_refused(params, frozen, words):
    with pytest.raises(ValueError) as error:
        frozen.init(params)
    assert all(word in str(error.value) for word in words), error.value


def test_a_mask_of_no_weight_cannot_be_rewound(params):
    with pytest.raises(ValueError, match="'layers/z'"):
        rewind(params, params, {"layers": {"z": np.ones(3, bool)}})
