"""Wanda and SNIP sums against per-sample loops in float64; padding, batches, devices, memory, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_rows, tiny_config, tiny_params

from jaxsafe.kernels import importance
from jaxsafe.kernels.forward import capture
from jaxsafe.kernels.importance import (
    LOSSES,
    POSITIONS,
    Counting,
    absolute_products,
    counted,
    gram_sums,
    kept_bytes,
    no_sums,
    snip_scores,
    snip_sums,
    wanda_scores,
    wanda_sums,
)
from jaxsafe.model.transformer import forward
from jaxsafe.model.weights import flatten, linear_maps, shardings
from jaxsafe.parallel import parse_mesh, per_device
from jaxsafe.rows import pad_rows

CONFIGS = {
    "grouped": tiny_config(),
    "biases": tiny_config(qkv_bias=True, o_bias=True, mlp_bias=True, kv_heads=4, window=9),
}
# Every length is a program where rows run alone.
ROWS = random_rows([20, 31, 20, 31, 40, 20, 40, 31], behind=[5, 7, 3, 9, 11, 4, 6, 2])
TAPS = ("attn_in", "heads", "mlp_in", "mlp_hidden")
static = ("config", "counting", "last", "axis_name")
snip = jax.jit(snip_sums, static_argnames=static)
wanda = jax.jit(wanda_sums, static_argnames=("config", "positions", "axis_name"))
captured = jax.jit(capture, static_argnames=("config", "taps"))
gram = jax.jit(gram_sums, static_argnames=("config", "positions", "last", "axis_name"))


def close(got, want, tolerance=2e-5):
    flat = flatten(want)
    assert flatten(got).keys() == flat.keys()
    for path, value in flatten(got).items():
        scale = np.abs(flat[path]).max()
        np.testing.assert_allclose(np.asarray(value) / scale, flat[path] / scale, atol=tolerance, err_msg=path)


def chosen(row, positions):
    """The indices of a row's counted tokens."""
    cut = row.instruction_end + 1
    return {"response": range(cut, len(row.ids)), "prompt": range(cut), "all": range(len(row.ids))}[positions]


@functools.cache
def slow_inputs(name):
    """{tap: [L, T, F] float64} of every row alone, without padding."""
    config = CONFIGS[name]
    out = []
    for row in ROWS:
        one = pad_rows([row], length=len(row.ids))
        read = captured(config, tiny_params(config), one.tokens, one.valid, TAPS)
        out.append({tap: np.asarray(x[:, 0], np.float64) for tap, x in read.items()})
    return out


@functools.partial(jax.jit, static_argnums=0)
def row_gradients(config, params, row, shares):
    """The gradient of a row's loss, each token's of which counts by its share, by every linear map."""

    def row_loss(maps):
        tree = {**params, "layers": {**params["layers"], **maps}}
        logprobs = jax.nn.log_softmax(forward(config, tree, row.tokens, row.valid)[0])
        return -(logprobs[jnp.arange(len(shares) - 1), row.tokens[0, 1:]] * shares[1:]).sum()

    return jax.grad(row_loss)(
        {path.split("/")[1]: params["layers"][path.split("/")[1]] for path in linear_maps(config)}
    )


def slow_snip(name, positions, loss):
    """The sum over rows of the absolute gradient, row by row, with a loss written out."""
    config = CONFIGS[name]
    sums = dict[str, np.ndarray]()
    for row in ROWS[:4]:
        terms = [i for i in chosen(row, positions) if i > 0]
        shares = np.zeros(len(row.ids), np.float32)
        shares[terms] = 1 / len(terms) if loss == "mean" else 1
        one = pad_rows([row], length=len(row.ids))
        for key, gradient in row_gradients(config, tiny_params(config), one, shares).items():
            sums[key] = sums.get(key, 0) + np.abs(np.asarray(gradient, np.float64))
    return {"layers": sums}


@pytest.mark.parametrize(
    ("name", "positions", "loss"),
    [
        ("grouped", "response", "mean"),
        pytest.param("grouped", "response", "sum", marks=pytest.mark.slow),
        ("grouped", "prompt", "mean"),
        ("biases", "all", "sum"),
        pytest.param("biases", "response", "mean", marks=pytest.mark.slow),
    ],
)
def test_snip_is_the_sum_of_per_sample_absolute_gradients(name, positions, loss):
    config = CONFIGS[name]
    batch = pad_rows(ROWS[:4])
    last = 12 if positions == "response" else None
    got = snip(config, tiny_params(config), batch, no_sums(config), Counting(positions, loss), last)
    close(got, slow_snip(name, positions, loss))


def test_logits_of_long_texts_exist_block_by_block(monkeypatch):
    """With the same sums as all at once; in no block they are those of all slots."""
    config = CONFIGS["grouped"]
    params, batch = tiny_params(config), pad_rows(ROWS[:4])
    B, T = batch.tokens.shape
    monkeypatch.setattr(importance, "LOGIT_BLOCK", 9)

    def sums(counting):
        return snip_sums(config, params, batch, no_sums(config), counting)

    close(jax.jit(sums, static_argnums=0)(Counting("all", "sum")), slow_snip("grouped", "all", "sum"))
    program = str(jax.make_jaxpr(sums, static_argnums=0)(Counting("all", "sum")))
    assert f"[{B},9,{config.vocab}]" in program
    assert f"[{B},{T - 1},{config.vocab}]" not in program and f"[{B},{T},{config.vocab}]" not in program


def test_the_mean_of_absolute_values_is_not_the_absolute_mean():
    config = CONFIGS["grouped"]
    both = snip(config, tiny_params(config), pad_rows(ROWS[:2]), no_sums(config))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3)), jnp.float32)
    opposed = absolute_products(jnp.stack([x[0], -x[0]]), jnp.stack([x[1], x[1]]), jnp.zeros((3, 3)))
    np.testing.assert_allclose(opposed, 2 * np.abs(np.asarray(x[0]).T @ np.asarray(x[1])), rtol=1e-5)
    assert all(float(leaf.min()) >= 0 and float(leaf.max()) > 0 for leaf in jax.tree.leaves(both))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_wanda_and_gram_are_loops_over_counted_tokens(name, positions):
    config = CONFIGS[name]
    params, batch = tiny_params(config), pad_rows(ROWS)
    down = np.asarray(params["layers"]["down"], np.float64)
    squares = dict.fromkeys(TAPS, 0.0)
    outer = dict.fromkeys(TAPS, 0.0)
    for row, inputs in zip(ROWS, slow_inputs(name), strict=True):
        for tap, x in inputs.items():
            for t in chosen(row, positions):
                squares[tap] = squares[tap] + x[:, t] ** 2
                y = x[:, t] if tap != "mlp_hidden" or config.mlp_bias else np.einsum("li,lio->lo", x[:, t], down)
                outer[tap] = outer[tap] + y[:, :, None] * y[:, None, :]
    if not config.mlp_bias:
        outer["down"] = outer.pop("mlp_hidden")
    close(wanda(config, params, batch, positions), squares)
    close(gram(config, params, batch, positions), outer)
    if positions == "response":
        close(gram(config, params, batch, positions, last=12), outer)


def test_scores_are_weight_times_statistic():
    config = CONFIGS["grouped"]
    params, batch = tiny_params(config), pad_rows(ROWS)
    sums = wanda(config, params, batch)
    scores = wanda_scores(config, params, sums, len(ROWS))
    w, s = (np.asarray(a, np.float64) for a in (params["layers"]["o"], sums["heads"]))
    want = np.abs(w) * np.sqrt(s / len(ROWS)).reshape(3, 4, 8, 1)
    np.testing.assert_allclose(scores["layers"]["o"], want, rtol=1e-5)
    gradients = snip(config, params, batch, no_sums(config))
    want = np.abs(params["layers"]["k"]) * np.asarray(gradients["layers"]["k"]) / len(ROWS)
    np.testing.assert_allclose(
        snip_scores(config, params, gradients, len(ROWS))["layers"]["k"], want, rtol=1e-5, atol=1e-9
    )
    assert flatten(scores).keys() == linear_maps(config).keys()
    with pytest.raises(ValueError, match="at least one sample"):
        wanda_scores(config, params, sums, 0)


@settings(max_examples=6, deadline=None)
@given(st.permutations(range(len(ROWS))), st.integers(1, len(ROWS) - 1))
def test_sums_do_not_depend_on_order_or_on_how_the_data_are_cut(order, cut):
    config = CONFIGS["grouped"]
    params = tiny_params(config)
    rows = [ROWS[i] for i in order]
    whole = snip(config, params, pad_rows(ROWS, length=48), no_sums(config))
    parts = no_sums(config)
    for some in (rows[:cut], rows[cut:]):
        parts = snip(config, params, pad_rows(some, length=48, count=8), parts)
    close(parts, jax.device_get(whole))


@pytest.mark.parametrize("mesh", ["data:4,model:2", "data:8"])
def test_devices_share_the_rows_and_add_up(mesh):
    config = CONFIGS["grouped"]
    params, batch = tiny_params(config), pad_rows(ROWS)
    mesh = parse_mesh(mesh)
    n = mesh.shape["data"]
    shares = jax.tree.map(lambda a: a.reshape(n, len(ROWS) // n, *a.shape[1:]), batch)
    placed = jax.device_put(params, shardings(config, mesh))

    def everything(params, batch, axis_name):
        return {
            "snip": snip_sums(config, params, batch, no_sums(config), axis_name=axis_name),
            "wanda": wanda_sums(config, params, batch, axis_name=axis_name),
            "gram": gram_sums(config, params, batch, axis_name=axis_name),
        }

    one = jax.device_get(jax.jit(lambda p, b: everything(p, b, None))(params, batch))
    summed = functools.partial(everything, axis_name="data")
    found = {
        "per_device": per_device(summed, mesh, (None, 0))(placed, shares),
        "pmap": jax.pmap(summed, "data", in_axes=(None, 0), devices=jax.devices()[:n])(params, shares),
    }
    for name, result in found.items():
        for kind in one:
            for device in (0, n - 1):
                got = jax.tree.map(lambda a, device=device: np.asarray(a)[device], result[kind])
                close(got, one[kind]), name


def test_memory_does_not_grow_with_a_copy_of_the_scores():
    """Sums are updated in place: beyond arguments and results there is room for activations and one map only."""
    config = tiny_config(layers=12, embed=64, mlp=256, context=64)
    batch = pad_rows(random_rows([12, 12], behind=[4, 4]))
    step = jax.jit(snip_sums, static_argnames=static, donate_argnames=("sums",))
    memory = step.lower(config, tiny_params(config), batch, no_sums(config), last=8).compile().memory_analysis()
    widths = 12 * 2 * 16 * (4 * 64 + 3 * 256 + 6 * 64)
    assert memory.alias_size_in_bytes >= kept_bytes(config)
    assert memory.temp_size_in_bytes < 0.5 * kept_bytes(config) + 8 * 4 * widths


def test_unknown_names_are_refused():
    batch = pad_rows(ROWS[:2])
    with pytest.raises(ValueError, match="positions 'answer' is not known; use one of response, prompt, all"):
        counted(batch, "answer")
    config = CONFIGS["grouped"]
    with pytest.raises(ValueError, match="loss 'median' is not known; use one of mean, sum"):
        snip_sums(config, tiny_params(config), batch, no_sums(config), Counting(loss="median"))
    assert LOSSES == ("mean", "sum")
