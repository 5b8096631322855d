"""A residual stream in float32 around products of bfloat16: nearer to the exact numbers, in everything that is done."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILY_MODELS
from folders import write_folder
from tiny import random_rows, tiny_config, tiny_params

from jaxsafe.io.hf import save_hf
from jaxsafe.io.hub import load_hf
from jaxsafe.kernels.forward import capture, extended
from jaxsafe.kernels.importance import Counting, no_sums, snip_sums, wanda_sums
from jaxsafe.kernels.layer_sums import LayerSums, add_snip
from jaxsafe.kernels.likelihood import answer_nll
from jaxsafe.model.attention import Slots
from jaxsafe.model.families import config_from_hf
from jaxsafe.model.taps import TAPS
from jaxsafe.model.transformer import Transformer, forward
from jaxsafe.model.weights import flatten
from jaxsafe.rows import pad_rows

BATCH = pad_rows(random_rows([40, 25, 9], vocab=64, behind=[6, 5, 3]))


def three(config, seed=0):
    """(config, weights) of one model: in float32, of bfloat16 throughout, and of bfloat16 around a float32 stream."""
    half = dataclasses.replace(config, dtype="bfloat16")
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), tiny_params(config, seed))
    exact = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    return (config, exact), (half, params), (dataclasses.replace(half, stream="float32"), params)


# Biases; norms behind maps, windows and two rotary tables; norms of whole projections and none before maps.
@pytest.fixture(params=["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "olmo2"))])
def config(request):
    return config_from_hf(FAMILY_MODELS[request.param])


def distance(a, b):
    """The size of a - b, in sizes of b, over all arrays."""
    pairs = [(np.asarray(x, float), np.asarray(y, float)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]
    return np.sqrt(sum(np.square(x - y).sum() for x, y in pairs) / sum(np.square(y).sum() for _, y in pairs))


def distances(config, of):
    """How far what is made `of` a model is from float32, throughout and around a float32 stream, over six models."""
    of = jax.jit(of, static_argnums=0)
    made = ([of(*model) for model in three(config, seed)] for seed in range(6))
    squares = [[distance(narrow, exact) ** 2, distance(wide, exact) ** 2] for exact, narrow, wide in made]
    return np.sqrt(np.mean(squares, axis=0))


def test_logits_are_nearer(config):
    narrow, wide = distances(config, lambda *model: forward(*model, BATCH.tokens, BATCH.valid)[BATCH.valid])
    assert 0 < wide < 0.8 * narrow < 0.05


def gradient(config, params):
    found = jax.grad(lambda p: answer_nll(config, p, BATCH)[0].sum())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(config.dtype)}
    return found


@pytest.mark.parametrize(
    "of",
    [gradient, lambda *model: snip_sums(*model, BATCH, no_sums(model[0])), lambda *model: wanda_sums(*model, BATCH)],
    ids=["gradient", "snip", "wanda"],
)
def test_scores_and_gradients_are_nearer(config, of):
    narrow, wide = distances(config, of)
    assert 0 < wide < 0.9 * narrow < 0.08


def test_the_stream_and_what_maps_give_is_float32_and_what_they_read_is_not(config):
    config, params = three(config)[2]
    read = capture(config, params, BATCH.tokens, BATCH.valid, (*TAPS, "embed", "final"))
    inputs = {"attn_in", "heads", "mlp_in", "mlp_hidden", "final"}
    assert {name: a.dtype for name, a in read.items()} == {
        name: jnp.bfloat16 if name in inputs else jnp.float32 for name in read
    }


def test_scores_are_the_same_layer_by_layer(config):
    config, params = three(config)[2]
    whole = flatten(jax.jit(snip_sums, static_argnums=0)(config, params, BATCH, no_sums(config)))
    few = jax.tree.map(lambda a: a[1:2], no_sums(config))
    found = jax.jit(add_snip, static_argnums=(0, 4))(config, params, BATCH, LayerSums(1, few), Counting())
    for path, leaf in flatten(found.sums).items():
        assert distance(leaf, whole[path][1:2]) < 2e-3, path


def test_a_cache_holds_what_products_read_and_gives_the_same(config):
    config, params = three(config)[2]
    tokens, valid = BATCH.tokens, BATCH.valid
    model, T = Transformer(config), tokens.shape[1]
    whole, _ = model.apply({"params": params}, tokens, Slots(valid))
    _, cache = model.apply({"params": params}, tokens[:, :-1], Slots(valid[:, :-1]))
    assert {a.dtype for a in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
    last, _ = model.apply({"params": params}, tokens[:, -1:], Slots(valid, T - 1), extended(cache, T))
    assert distance(last[:, 0], whole[:, -1]) < 5e-3


def test_models_are_loaded_with_the_stream_of_the_device_and_saved_without(tmp_path):
    config = tiny_config(dtype="bfloat16")
    folder = write_folder(tmp_path / "model", config)
    loaded, params = load_hf(folder)
    assert loaded == dataclasses.replace(config, stream="float32" if jax.default_backend() == "cpu" else None)
    assert load_hf(folder, "float32")[0] == dataclasses.replace(config, dtype="float32")
    again, _ = load_hf(save_hf(tmp_path / "again", loaded, params, like=folder))
    assert again == loaded


@pytest.mark.parametrize("stream", ["bfloat16", "float16", "float64"])
def test_another_stream_is_refused(stream):
    with pytest.raises(ValueError, match=f"stream '{stream}'.*'float32' or None"):
        tiny_config(dtype="float32", stream=stream)
