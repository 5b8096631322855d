"""Adapters: how they begin, and the merged model against a forward pass with low-rank products written here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_rows, tiny_config, tiny_params

from jaxsafe.kernels.lora import (
    MAPS,
    LoRA,
    beside_changes,
    changes,
    dropped,
    init,
    merge_adapters,
    row_keys,
    unmerged,
)
from jaxsafe.model.transformer import forward
from jaxsafe.model.weights import flatten
from jaxsafe.parallel import parse_mesh
from jaxsafe.rows import pad_rows

CONFIG = tiny_config(layers=2)
ALPHA = 5.0
logits_of = jax.jit(forward, static_argnames=("config", "last"))
SHAPES = {
    "q": ((2, 32, 3), (2, 3, 4, 8)),
    "k": ((2, 32, 3), (2, 3, 2, 8)),
    "v": ((2, 32, 3), (2, 3, 2, 8)),
    "o": ((2, 4, 8, 3), (2, 3, 32)),
    "gate": ((2, 32, 3), (2, 3, 48)),
    "up": ((2, 32, 3), (2, 3, 48)),
    "down": ((2, 48, 3), (2, 3, 32)),
}


@pytest.fixture(scope="module")
def params():
    return tiny_params(CONFIG)


def lively(maps=MAPS, seed=0):
    """Adapters as after some training."""
    adapters, rng = init(CONFIG, LoRA(3, ALPHA, maps), 1), np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape).astype(np.float32), adapters)


def unmerged_logits(params, adapters, ids):
    """A decoder of one row in float64, every map x W + (alpha / R) (x A) B."""
    P, A = (jax.tree.map(lambda a: np.asarray(a, np.float64), tree) for tree in (params, adapters))
    T = len(ids)

    def norm(x, scale):
        return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps)

    def linear(x, name, layer):
        y = x @ P["layers"][name][layer].reshape(x.shape[-1], -1)
        if name in A["layers"]:
            a, b = A["layers"][name]["a"][layer], A["layers"][name]["b"][layer]
            y = y + ALPHA / 3 * ((x @ a.reshape(-1, 3)) @ b.reshape(3, -1))
        return y

    def rotate(x):
        angle = np.arange(T)[:, None, None] / CONFIG.rope.theta ** (np.arange(0, 8, 2) / 8)
        first, second = x[..., :4], x[..., 4:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    x = P["embed"][list(ids)]
    for layer in range(CONFIG.layers):
        h = norm(x, P["layers"]["attn_norm"][layer])
        q, k, v = (linear(h, name, layer).reshape(T, -1, 8) for name in "qkv")
        q, k = rotate(q), rotate(k)
        heads = []
        for n in range(4):
            scores = np.where(np.tri(T) > 0, q[:, n] @ k[:, n // 2].T / np.sqrt(8), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, n // 2])
        x = x + linear(np.concatenate(heads, -1), "o", layer)
        h = norm(x, P["layers"]["mlp_norm"][layer])
        gate = linear(h, "gate", layer)
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "up", layer), "down", layer)
    return norm(x, P["norm"]) @ P["unembed"]


def test_new_adapters_change_nothing(params):
    adapters = init(CONFIG, LoRA(3), 0)
    assert {name: (pair["a"].shape, pair["b"].shape) for name, pair in adapters["layers"].items()} == SHAPES
    for pair in adapters["layers"].values():
        assert pair["a"].dtype == pair["b"].dtype == jnp.float32
        assert not pair["b"].any()
        inputs = pair["a"].size / 6
        assert float(jnp.square(pair["a"]).mean()) == pytest.approx(1 / inputs, rel=0.4)
    a = [np.ravel(pair["a"])[:5].tolist() for pair in adapters["layers"].values()]
    assert len(set(map(tuple, a))) == 7
    jax.tree.map(np.testing.assert_array_equal, merge_adapters(CONFIG, params, adapters, 16.0), params)


def test_the_seed_draws_the_adapters_and_the_maps_do_not_matter():
    first, again, other = (init(CONFIG, LoRA(3), seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["layers"]["q"]["a"], other["layers"]["q"]["a"])
    some = init(CONFIG, LoRA(3, maps=("down", "q")), 0)
    assert set(some["layers"]) == {"q", "down"}
    np.testing.assert_array_equal(some["layers"]["down"]["a"], first["layers"]["down"]["a"])


@pytest.mark.parametrize("maps", [MAPS, ("q", "v"), ("o", "down")])
def test_the_merged_model_computes_what_the_adapters_do(params, maps):
    adapters = lively(maps)
    merged = merge_adapters(CONFIG, params, adapters, ALPHA)
    row = random_rows([20])[0]
    batch = pad_rows([row], length=20)
    logits = logits_of(CONFIG, merged, batch.tokens, batch.valid)[0]
    np.testing.assert_allclose(logits, unmerged_logits(params, adapters, row.ids), atol=1e-4)
    plain = logits_of(CONFIG, params, batch.tokens, batch.valid)[0]
    assert float(jnp.abs(logits - plain).max()) > 0.1
    for path, weight in flatten(merged).items():
        moved = path.removeprefix("layers/") in maps
        assert np.array_equal(weight, flatten(params)[path]) != moved, path
        if moved:
            change = (weight - flatten(params)[path])[0].reshape(-1, np.prod(SHAPES[path[7:]][1][2:]))
            assert np.linalg.matrix_rank(change, tol=1e-4) == 3


def test_a_bfloat16_model_is_merged_in_float32_and_stays_bfloat16(params):
    half, adapters = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), lively()
    merged, change = flatten(merge_adapters(CONFIG, half, adapters, ALPHA)), flatten(changes(adapters, ALPHA))
    for path, weight in flatten(half).items():
        assert merged[path].dtype == jnp.bfloat16
        exact = weight.astype(jnp.float32) + change.get(path, 0)
        np.testing.assert_array_equal(merged[path], exact.astype(jnp.bfloat16))


def test_adapters_lie_on_the_mesh_as_their_maps_do():
    mesh = parse_mesh("data:-1,model:2")
    placed, alone = init(CONFIG, LoRA(3), 4, mesh)["layers"], init(CONFIG, LoRA(3), 4)["layers"]
    jax.tree.map(np.testing.assert_array_equal, placed, alone)
    specs = {name: tuple(tuple(pair[part].sharding.spec) for part in "ab") for name, pair in placed.items()}
    assert specs["gate"] == ((None, "data", None), (None, None, "model"))
    assert specs["o"] == ((None, "model", None, None), (None, None, "data"))


def test_what_is_no_adapter_is_refused(params):
    with pytest.raises(ValueError, match="rank 0"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match=r"\['q', 'embed'\].*gate"):
        LoRA(maps=("q", "embed"))
    with pytest.raises(ValueError, match="maps"):
        LoRA(maps=())
    with pytest.raises(ValueError, match=r"'q'.*\(2, 32\).*\(3, 32\)"):
        merge_adapters(tiny_config(layers=3), params, lively(("q",)), ALPHA)


# Adapters beside the weights


def beside(params, adapters, keys=None, dropout=0.0):
    return unmerged(params, adapters, ALPHA / 3, keys, dropout)


def test_adapters_beside_the_weights_compute_what_merged_ones_do(params):
    adapters, (row,) = lively(), random_rows([20])
    batch = pad_rows([row], length=20)
    logits = logits_of(CONFIG, beside(params, adapters), batch.tokens, batch.valid)[0]
    np.testing.assert_allclose(logits, unmerged_logits(params, adapters, row.ids), atol=1e-4)


def test_inputs_are_dropped_by_row_and_grow_in_the_mean():
    keys = jax.random.key_data(jax.random.split(jax.random.key(3), 4))
    x = jnp.ones((4, 300, 20))
    y = np.asarray(dropped(x, keys, 0.25))
    assert set(np.unique(y)) == {0, np.float32(4 / 3)}
    # 6000 draws a row: five standard deviations of the share are 0.028.
    np.testing.assert_allclose((y == 0).mean((1, 2)), 0.25, atol=0.028)
    assert all((y[i] != y[j]).any() for i in range(4) for j in range(i))
    np.testing.assert_array_equal(dropped(x[:, 100:], keys, 0.25), y[:, 100:], "slots count from the last one")
    np.testing.assert_array_equal(dropped(x[1:2], keys[1:2], 0.25), y[1:2])
    np.testing.assert_array_equal(dropped(x, None, 0.25), x)
    at = {name: row_keys(keys, name, 2) for name in ("q", "v")}
    every = np.concatenate([at["q"].reshape(-1, 2), at["v"].reshape(-1, 2)])
    assert len(np.unique(every, axis=0)) == 16, "every row, layer and map draws its own"


@pytest.mark.parametrize("name", MAPS)
def test_only_the_adapters_of_a_map_see_dropped_inputs(params, name):
    """y = x W + (alpha / R) (m x) A B by a map, with the mask m as it is drawn: exactly so of what enters the model."""
    adapters = lively((name,))
    keys = jax.random.key_data(jax.random.split(jax.random.key(1), 1))
    part = flatten(beside(params, adapters, keys, 0.5))[f"layers/{name}_adapter"]
    layer = jax.tree.map(lambda a: a[1], part)
    x = np.random.default_rng(0).standard_normal((1, 6, layer.a.shape[0])).astype(np.float32)
    a, b = (np.asarray(adapters["layers"][name][p][1], np.float64) for p in "ab")
    kept = np.asarray(dropped(jnp.ones_like(x), row_keys(keys, name, 2)[1], 0.5), np.float64)
    wanted = ALPHA / 3 * (kept * x) @ a.reshape(-1, 3) @ b.reshape(3, -1)
    np.testing.assert_allclose(layer(jnp.asarray(x)), wanted, atol=1e-5)
    whole = beside_changes(CONFIG, params, changes(adapters, ALPHA), keys, 0.5)["layers"][f"{name}_adapter"]
    np.testing.assert_allclose(jax.tree.map(lambda a: a[1], whole)(jnp.asarray(x)), wanted, atol=1e-5)


def test_a_share_of_all_inputs_is_refused():
    with pytest.raises(ValueError, match=r"LoRA dropout 1.0 is outside \[0, 1\)"):
        LoRA(dropout=1.0)
