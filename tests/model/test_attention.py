"""Attention by blocks and by a kernel against all scores at once: forward, backward and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import new_cache
from tiny import random_rows, tiny_config, tiny_params

from jaxsafe.kernels.importance import no_sums, snip_sums
from jaxsafe.kernels.likelihood import answer_nll
from jaxsafe.model import attention, blockwise
from jaxsafe.model.attention import Slots, attend, fused
from jaxsafe.model.transformer import Transformer, forward, variables
from jaxsafe.model.weights import shapes
from jaxsafe.rows import Batch, pad_rows

N, K, H = 4, 2, 8


@pytest.fixture
def small(monkeypatch):
    """Blocks of few slots, so that short texts have several; `attend` takes them where it is told to."""
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 16)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 24)

    def path(name):
        monkeypatch.setattr(attention, "DENSE", {"dense": 1 << 30, "blocks": 0}[name])

    return path


def operands(T, S, B=3, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(B, T, N, H), (B, K, S, H), (B, K, S, H), (B, T, N * H)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def slots_of(S, first=0):
    """A row of tokens only, a left-padded one with a gap, and one of padding."""
    valid = np.ones((3, S), bool)
    valid[1, : S // 3] = False
    valid[1, S // 2 : S // 2 + 4] = False
    valid[2] = False
    return Slots(valid, first)


def value_and_gradients(q, k, v, slots, window, probe):
    def heads(q, k, v):
        return attend(q, k, v, slots.queries(q.shape[1]), window)

    out, pull = jax.vjp(jax.jit(heads), q, k, v)
    return out, *pull(probe)


@pytest.mark.parametrize("window", [None, 1, 7, 30])
@pytest.mark.parametrize(("T", "S", "first"), [(70, 70, 0), (16, 24, 0), (33, 100, 67), (20, 90, 31), (5, 25, 20)])
def test_blocks_give_the_numbers_of_all_scores_at_once(small, window, T, S, first):
    q, k, v, probe = operands(T, S)
    small("dense")
    wanted = value_and_gradients(q, k, v, slots_of(S, first), window, probe)
    small("blocks")
    ours = value_and_gradients(q, k, v, slots_of(S, first), window, probe)
    assert np.abs(wanted[0][0]).max() > 0.5 and not np.asarray(wanted[0][2]).any()
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_a_window_and_a_slot_may_be_data(small):
    q, k, v, _ = operands(20, 90)
    small("blocks")
    run = jax.jit(lambda window, first: attend(q, k, v, Slots(slots_of(90).valid, first).queries(20), window))
    for window, first in [(5, 31), (40, 70)]:
        small("dense")
        wanted = attend(q, k, v, slots_of(90, first).queries(20), window)
        small("blocks")
        np.testing.assert_allclose(run(jnp.int32(window), jnp.int32(first)), wanted, atol=1e-5)
    assert run._cache_size() == 1


def test_half_precision_is_as_exact_by_blocks(small):
    q, k, v, probe = operands(70, 70, dtype=jnp.bfloat16)
    small("dense")
    exact = value_and_gradients(
        *(x.astype(jnp.float32) for x in (q, k, v)), slots_of(70), None, probe.astype("float32")
    )
    at_once = value_and_gradients(q, k, v, slots_of(70), None, probe)
    small("blocks")
    ours = value_and_gradients(q, k, v, slots_of(70), None, probe)
    for a, b, c in zip(ours, at_once, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        error, usual = (np.abs(np.asarray(x, np.float32) - c) for x in (a, b))
        assert error.max() < 1.5 * usual.max() + 1e-3


def test_a_kernel_that_knows_lengths_gives_the_same_numbers(small):
    q, k, v, probe = operands(40, 40)
    slots = slots_of(40)
    small("dense")
    wanted = value_and_gradients(q, k, v, slots, None, jnp.where(slots.valid[:, :, None], probe, 0))
    heads, pull = jax.vjp(lambda q, k, v: fused(q, k, v, jnp.asarray(slots.valid), "xla").reshape(3, 40, -1), q, k, v)
    np.testing.assert_allclose(heads, np.where(slots.valid[:, :, None], wanted[0], 0), atol=1e-5)
    for a, b in zip(pull(probe), wanted[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 11])
def test_a_model_of_long_texts_is_the_model_of_short_ones(small, window):
    config = tiny_config(window=window)
    params = tiny_params(config)
    batch = jax.tree.map(jnp.asarray, pad_rows(random_rows([90, 61, 12], behind=[30, 8, 3]), count=4))
    sums = no_sums(config)

    def numbers():
        logits = forward(config, params, batch.tokens, batch.valid)
        loss, gradient = jax.value_and_grad(lambda p: answer_nll(config, p, batch)[0].sum())(params)
        cache = new_cache(config, 4, batch.tokens.shape[1] + 40)
        held = Slots(jnp.pad(batch.valid, [(0, 0), (0, 40)]))
        cached, _ = Transformer(config).apply(variables(params), batch.tokens, held, cache)
        keep = batch.valid[:, :, None]
        return (
            jnp.where(keep, logits, 0),
            jnp.where(keep, cached, 0),
            loss,
            gradient,
            snip_sums(config, params, batch, sums),
        )

    small("dense")
    wanted = jax.jit(numbers)()
    small("blocks")
    ours = jax.jit(lambda: numbers())()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1, np.abs(b).max()))


# Memory

LONG = tiny_config(layers=2, embed=64, mlp=128, head_dim=16, context=8192)


def temporaries(program, T):
    batch = Batch(
        jax.ShapeDtypeStruct((1, T), jnp.int32),
        jax.ShapeDtypeStruct((1, T), bool),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    sums = jax.eval_shape(lambda: no_sums(LONG))
    return jax.jit(program).lower(shapes(LONG), batch, sums).compile().memory_analysis().temp_size_in_bytes


def prefill(params, batch, sums):
    return forward(LONG, params, batch.tokens, batch.valid, last=1)


def loss_gradient(params, batch, sums):
    return jax.grad(lambda p: answer_nll(LONG, p, batch)[0].sum())(params)


def snip(params, batch, sums):
    return snip_sums(LONG, params, batch, sums)


@pytest.mark.parametrize("program", [prefill, loss_gradient, snip])
def test_memory_grows_with_the_length_and_not_with_its_square(program):
    half, whole = (temporaries(program, T) for T in (2048, 4096))
    assert whole < 2.5 * half
    assert half < 4 * LONG.heads * 2048**2, "the scores of a layer"
