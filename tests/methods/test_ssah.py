"""Roles of units against loops over tokens in float64; counts, pruning and freezing against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import PROMPTS, tiny_chat_model, tiny_config

from jaxsafe.kernels.forward import capture
from jaxsafe.kernels.freezing import freeze, rewind
from jaxsafe.kernels.units import Units, unit_mask
from jaxsafe.methods.ssah import (
    Role,
    RoleShares,
    head_cost,
    kept_units,
    random_units,
    role_transfer,
    unit_roles,
    unit_scores,
    units_of,
    without_units,
)
from jaxsafe.methods.unit_inputs import input_moments, merged
from jaxsafe.model.taps import RowMoments, edit
from jaxsafe.model.transformer import forward
from jaxsafe.model.weights import flatten, nest
from jaxsafe.rows import pad_rows

TAPS = ("heads", "mlp_hidden")
LLAMA2 = tiny_config(layers=32, embed=4096, mlp=11008, heads=32, kv_heads=32, head_dim=128)
read = jax.jit(capture, static_argnames=("config", "taps"))
whole = jax.jit(forward, static_argnames=("config", "last"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two query heads a group, biases, and a norm behind attention and MLP."""
    return tiny_chat_model(
        tmp_path_factory.mktemp("model"), layers=2, qkv_bias=True, o_bias=True, mlp_bias=True, post_norm=True
    )


@pytest.fixture(scope="module")
def rows(model):
    answers = ("No.", "I cannot help with that, sorry.", "Of course: take a boat", "Yes, why not?")
    return [model.row(prompt, answer) for prompt, answer in zip(PROMPTS, answers, strict=False)]


@pytest.fixture(scope="module")
def inputs(model, rows):
    """{tap: for each row, float64 [L, T, F] of its response}"""
    batch = pad_rows(rows)
    states = read(model.config, model.params, batch.tokens, batch.valid, (*TAPS, "o", "down"))
    return {tap: [np.float64(a[:, b, batch.response[b]]) for b in range(len(rows))] for tap, a in states.items()}


def slow_as_coded(sequences):
    """Token by token, as published: `old` is the new mean, the first sequence counts for nothing."""
    mean, fluctuation = 0.0, 0.0
    for n, x in enumerate(sequences):
        mean = mean * n / (n + 1) + x.mean(1) / (n + 1)
        if n == 0:
            fluctuation = np.zeros_like(mean)
            continue
        fluctuation = fluctuation * (n - 1) / n
        for t in range(x.shape[1]):
            fluctuation += (x[:, t] - mean) ** 2 / (n + 1)
    return mean, fluctuation


def slow_scores(config, params, variance):
    heads, neurons = np.zeros((config.layers, config.heads)), np.zeros((config.layers, config.mlp))
    o, down = (np.asarray(params["layers"][name], np.float64) for name in ("o", "down"))
    for layer in range(config.layers):
        columns = [o[layer, n, h] for n in range(config.heads) for h in range(config.head_dim)]
        attention = np.array([(v * (w @ w)) ** 2 for v, w in zip(variance["heads"][layer], columns, strict=True)])
        mlp = np.array([v * (w @ w) for v, w in zip(variance["mlp_hidden"][layer], down[layer], strict=True)])
        attention, mlp = (
            (i - i.mean()) / np.sqrt(((i - i.mean()) ** 2).sum() / (len(i) - 1)) for i in (attention, mlp)
        )
        for n in range(config.heads):
            heads[layer, n] = attention[n * config.head_dim : (n + 1) * config.head_dim].mean()
        neurons[layer] = mlp
    return heads, neurons


@pytest.mark.parametrize("as_coded", [False, True])
def test_scores_are_those_of_loops_over_tokens(model, rows, inputs, as_coded):
    found = input_moments(model, rows, as_coded, batch_size=3)
    mean, variance = {}, {}
    for tap in TAPS:
        tokens = np.concatenate(inputs[tap], axis=1)
        honest = tokens.mean(1), tokens.var(1)
        mean[tap], variance[tap] = slow_as_coded(inputs[tap]) if as_coded else honest
        np.testing.assert_allclose(found.mean[tap], mean[tap], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.variance[tap], variance[tap], rtol=1e-4, atol=1e-6)
    scores = unit_scores(model.config, model.params, found)
    expected_scores = slow_scores(model.config, model.params, variance)
    for each, expected in zip((scores.heads, scores.neurons), expected_scores, strict=True):
        np.testing.assert_allclose(each, expected, rtol=1e-3, atol=1e-4)


def test_the_variance_about_a_large_mean_is_kept():
    rng = np.random.default_rng(0)
    x = (1e4 + rng.standard_normal((3, 9, 5))).astype(np.float32)
    counted = np.arange(9)[None] >= np.array([[0], [4], [8]])
    moments = RowMoments(counted)(jnp.asarray(x))
    mean, variance = merged(zip(counted.sum(1).tolist(), np.asarray(moments), strict=True))
    np.testing.assert_allclose(mean, np.float64(x)[counted].mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, np.float64(x)[counted].var(0), rtol=2e-3)


def llama2_scores(best, worst):
    """Scores whose S - U ranks `best` heads among the first units and `worst` among the last."""
    rng = np.random.default_rng(0)
    heads, neurons = np.zeros(32 * 32), rng.standard_normal(32 * 11008)
    heads[rng.permutation(1024)[: best + worst]] = np.repeat([9.0, -9.0], [best, worst])
    safety = Units(heads.reshape(32, 32), neurons.reshape(32, 11008))
    return safety, Units(rng.uniform(0.0, 1e-9, (32, 32)), rng.uniform(0.0, 1e-9, (32, 11008)))


def test_counts_of_llama_2_are_the_published_ones():
    assert head_cost(LLAMA2) == 170
    roles = unit_roles(LLAMA2, *llama2_scores(best=4, worst=34))
    safety, utility = units_of(roles, Role.SAFETY), units_of(roles, Role.UTILITY)
    assert (safety.heads.sum(), safety.neurons.sum()) == (4, 4583)
    assert utility.heads.sum() == 34 and utility.heads.sum() * 170 + utility.neurons.sum() == 52634
    fewer = units_of(unit_roles(LLAMA2, *llama2_scores(best=3, worst=0)), Role.SAFETY)
    assert (fewer.heads.sum(), fewer.neurons.sum()) == (3, 4583 + 170)


def test_a_later_role_takes_the_place_of_an_earlier_one():
    config = tiny_config(layers=1, heads=2, kv_heads=2, head_dim=2, mlp=6)
    assert head_cost(config) == 2
    safety = Units(np.array([[0.0, 0.0]]), np.array([[5.0, 4.0, 0.0, 0.0, -6.0, -7.0]]))
    utility = Units(np.array([[0.0, 0.0]]), np.array([[-9.0, 0.0, 0.0, 0.0, 0.0, 2.0]]))
    roles = unit_roles(config, safety, utility, RoleShares(safety=0.2, utility=0.1, redundant=0.5))
    # S + U: -4 and 4, 0, 0, -6, -5, and the first of the ties, a head; S - U: 14, 4, 0, 0, -6, -9.
    assert roles.heads.tolist() == [[Role.REDUNDANT, Role.COMPLEX]]
    order = [Role.SAFETY, Role.SAFETY, Role.COMPLEX, Role.COMPLEX, Role.REDUNDANT, Role.UTILITY]
    assert roles.neurons.tolist() == [order]
    nothing = unit_roles(config, safety, utility, RoleShares(0, 0, 0))
    assert (nothing.heads == Role.COMPLEX).all() and (nothing.neurons == Role.COMPLEX).all()
    with pytest.raises(ValueError, match=r"safety 1\.5 is no share of"):
        RoleShares(safety=1.5)


def test_a_shared_key_value_head_is_shared_out():
    # 2 * 128 weights a width of q and o, 2 * 128 / 4 of k and v, by 3 of a neuron.
    assert head_cost(tiny_config(heads=32, kv_heads=8, head_dim=128)) == 106


def test_random_units_are_as_many_in_each_layer():
    rng = np.random.default_rng(1)
    units = Units(rng.random((3, 8)) < 0.3, rng.random((3, 50)) < 0.2)
    control = random_units(units, seed=2)
    for each, other in ((units.heads, control.heads), (units.neurons, control.neurons)):
        np.testing.assert_array_equal(each.sum(1), other.sum(1))
        assert (each != other).any()
    again, another = random_units(units, seed=2), random_units(units, seed=3)
    assert (again.neurons == control.neurons).all() and (another.neurons != control.neurons).any()


def test_role_transfer_counts_pairs():
    before = Units(np.array([[0, 1]], np.int8), np.array([[1, 2, 3, 3]], np.int8))
    after = Units(np.array([[0, 3]], np.int8), np.array([[1, 2, 3, 0]], np.int8))
    expected = [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 1]]
    assert role_transfer(before, after).tolist() == expected


def some_units(config, heads, neurons):
    """The units of these (layer, number)s."""
    units = Units(np.zeros((config.layers, config.heads), bool), np.zeros((config.layers, config.mlp), bool))
    for each, places in ((units.heads, heads), (units.neurons, neurons)):
        for place in places:
            each[place] = True
    return units


def test_a_model_whose_pruned_units_are_constant_is_the_same(model, rows):
    """Heads of a group whose values are a bias, and neurons whose gate and input are one."""
    flat = flatten(model.params)
    units = some_units(model.config, [(0, 1), (1, 2), (1, 3)], [(0, 5), (1, 0), (1, 47)])
    for path, places in (
        ("v", [(0, 0), (1, 1)]),
        ("gate", [(0, 5), (1, 0), (1, 47)]),
        ("up", [(0, 5), (1, 0), (1, 47)]),
    ):
        for layer, unit in places:
            flat[f"layers/{path}"] = flat[f"layers/{path}"].at[layer, :, unit].set(0.0)
    constant = model.with_params(nest(flat))
    pruned = without_units(constant, units, input_moments(constant, rows))
    batch = pad_rows(rows)
    plain, found, uncompensated = (
        np.asarray(whole(model.config, params, batch.tokens, batch.valid, edits))[batch.valid]
        for params, edits in ((constant.params, None), (pruned.params, pruned.edits), (pruned.params, None))
    )
    np.testing.assert_allclose(found, plain, atol=2e-4)
    assert np.abs(uncompensated - plain).max() > 0.05


def test_pruned_units_give_their_mean(model, rows, inputs):
    """In the first layer, whose inputs are those of the whole model; another edit of the tap acts behind."""
    units = some_units(model.config, [(0, 1), (0, 2)], [(0, 3), (0, 30), (1, 4)])
    moments = input_moments(model, rows)
    own = np.arange(64, dtype=np.float32).reshape(2, 32) / 9
    pruned = without_units(model.with_edits({"down": edit(add=own)}), units, moments)
    batch = pad_rows(rows)
    states = read(model.config, pruned.params, batch.tokens, batch.valid, (*TAPS, "o", "down"), pruned.edits)
    states = {tap: np.float64(a[:, batch.response]) for tap, a in states.items()}
    for tap, name, lost in (("heads", "o", np.repeat(units.heads, 8, 1)), ("mlp_hidden", "down", units.neurons)):
        for layer in range(1 if name == "o" else 2):
            x = np.where(lost[layer], np.concatenate(inputs[tap], 1)[layer].mean(0), states[tap][layer])
            weight = np.float64(model.params["layers"][name][layer]).reshape(-1, 32)
            expected = x @ weight + np.float64(model.params["layers"][f"{name}_bias"][layer])
            expected = expected + (own[layer] if name == "down" else 0)
            np.testing.assert_allclose(states[name][layer], expected, atol=1e-4)
    changed = {path for path, a in flatten(pruned.params).items() if (a != flatten(model.params)[path]).any()}
    assert changed == {"layers/o", "layers/down"}


def test_frozen_units_keep_all_of_their_weights(model):
    units = some_units(model.config, [(0, 1)], [(1, 4)])
    mask = unit_mask(model.config, units)
    before = model.params
    gradients = jax.tree.map(jnp.ones_like, before)
    chain = optax.chain(optax.sgd(0.1), freeze(mask))
    updates, _ = chain.update(gradients, chain.init(before), before)
    moved = {path: np.asarray(u) != 0 for path, u in flatten(updates).items()}
    still = {path: np.zeros(u.shape, bool) for path, u in moved.items()}
    for name in ("q", "k", "v"):  # the second query head reads the first key/value head
        head = 1 if name == "q" else 0
        still[f"layers/{name}"][0, :, head] = still[f"layers/{name}_bias"][0, head] = True
    still["layers/o"][0, 1] = still["layers/down"][1, 4] = True
    for name in ("gate", "up"):
        still[f"layers/{name}"][1, :, 4] = still[f"layers/{name}_bias"][1, 4] = True
    for path, where in moved.items():
        np.testing.assert_array_equal(where, ~still[path], err_msg=path)
    back = flatten(rewind(optax.apply_updates(before, gradients), before, mask))
    for path, weight in flatten(before).items():
        np.testing.assert_array_equal(np.asarray(back[path]) == np.asarray(weight), still[path], err_msg=path)


def test_what_does_not_fit_is_refused(model, rows):
    with pytest.raises(ValueError, match=r"shapes \(1, 4\) and \(2, 48\); the model has \(\(2, 4\), \(2, 48\)\)"):
        unit_mask(model.config, Units(np.zeros((1, 4), bool), np.zeros((2, 48), bool)))
    with pytest.raises(ValueError, match="row 1 has no response"):
        input_moments(model, [rows[0], model.row("Why?")])
    with pytest.raises(ValueError, match="there are no rows"):
        input_moments(model, [])


def test_units_of_safety_and_the_most_important_complex_ones_are_kept():
    C, S, U, R = Role.COMPLEX, Role.SAFETY, Role.UTILITY, Role.REDUNDANT
    roles = Units(np.array([[C, U], [S, C]]), np.array([[C, S, R, C], [C, C, U, R]]))
    score = Units(np.array([[0.1, 9], [0, 0.7]]), np.array([[0.5, 0, 9, 0.7], [0.2, 0.9, 9, 9]]))
    safety = units_of(roles, S)

    def more(share):
        kept = kept_units(roles, score, share)
        assert (kept.heads >= safety.heads).all() and (kept.neurons >= safety.neurons).all()
        return [
            [(of, *map(int, place)) for place in np.argwhere(k & ~s)]
            for of, k, s in (("head", kept.heads, safety.heads), ("neuron", kept.neurons, safety.neurons))
        ]

    assert more(0.0) == [[], []] and more(1 / 12) == [[], [("neuron", 1, 1)]]
    # Of equal scores heads come before neurons; shares are of all 12 units, rounded.
    assert more(2 / 12) == [[("head", 1, 1)], [("neuron", 1, 1)]] == more(0.2)
    complex_units = [
        [("head", 0, 0), ("head", 1, 1)],
        [("neuron", 0, 0), ("neuron", 0, 3), ("neuron", 1, 0), ("neuron", 1, 1)],
    ]
    assert more(6 / 12) == more(1.0) == complex_units
