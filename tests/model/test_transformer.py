"""The forward pass: parity with transformers, every field of the configuration in use, rows and padding, the cache."""

import dataclasses

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import SCALED, TINY, hf_weights, logits_of, new_cache, padded, random_params, replace

from jaxsafe.io.hub import load_hf
from jaxsafe.model.attention import Slots, attend, positions_of
from jaxsafe.model.config import ModelConfig, Rope
from jaxsafe.model.transformer import Transformer, forward, init, unembed, unembedding
from jaxsafe.model.weights import TABLE, count_parameters, flatten, shapes, weights

# Parity with transformers

SIZES = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LLAMA3_HF = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_HF |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
PARITY = {
    "llama3 rope, tied": {"rope_parameters": LLAMA3_HF, "tie_word_embeddings": True, "head_dim": 16},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}},
    "explicit head_dim": {"head_dim": 20, "rms_norm_eps": 1e-6},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "1 kv head": {"num_key_value_heads": 1},
    "8 kv heads": {"num_key_value_heads": 8},
    "mistral, window": {"model_type": "mistral", "sliding_window": 10},
    "mistral, no window, tied": {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", PARITY)
def test_parity_with_transformers(name, tmp_path):
    pytest.importorskip("torch")
    from make import torch_logits, torch_model

    model = torch_model(SIZES | PARITY[name])
    model.save_pretrained(tmp_path)
    config, params = load_hf(tmp_path)
    assert count_parameters(params) == sum(p.numel() for p in model.parameters())
    tokens, valid = padded(config, [56, 48, 9])
    logits = np.asarray(logits_of(config, params, tokens, valid))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[valid], torch_logits(model, tokens, valid)[valid], atol=1e-5, rtol=0)


# Every field is in use

LINEAR = replace(TINY, rope={"kind": "linear", "factor": 4.0})
BIASED = dataclasses.replace(TINY, qkv_bias=True, o_bias=True, mlp_bias=True)
WINDOW = dataclasses.replace(TINY, window=16, family="mistral")
SCALED_WINDOW = dataclasses.replace(SCALED, window=16)
MUTATIONS = [
    (TINY, {"norm_eps": 1e-6}),
    (TINY, {"window": 47}),
    (WINDOW, {"window": None}),
    (WINDOW, {"window": 15}),
    (WINDOW, {"window": 17}),
    (TINY, {"tied": True}),
    (BIASED, {"qkv_bias": False}),
    (BIASED, {"o_bias": False}),
    (BIASED, {"mlp_bias": False}),
    (TINY, {"rope": {"theta": 20_000.0}}),
    (TINY, {"rope": {"kind": "linear", "factor": 2.0}}),
    (LINEAR, {"rope": {"theta": 20_000.0}}),
    (LINEAR, {"rope": {"factor": 8.0}}),
    (LINEAR, {"rope": {"kind": "default"}}),
    (SCALED, {"rope": {"theta": 20_000.0}}),
    (SCALED, {"rope": {"factor": 4.0}}),
    (SCALED, {"rope": {"low_freq_factor": 1.5}}),
    (SCALED, {"rope": {"high_freq_factor": 3.0}}),
    (SCALED, {"rope": {"original_context": 48}}),
    (SCALED, {"rope": {"kind": "linear"}}),
]
SANDWICH = dataclasses.replace(TINY, window=16, post_norm=True, qk_norm="head", sliding=(True, False, True))
SANDWICH = dataclasses.replace(SANDWICH, local_rope=Rope(100.0), softcap=1.0, final_softcap=1.0)
YARN = replace(TINY, rope={"kind": "yarn", "theta": 100.0, "factor": 4.0, "original_context": 512})
LONG = replace(TINY, rope={"kind": "longrope", "divisors": tuple(1 + i / 2 for i in range(8))})
MUTATIONS += [
    (SANDWICH, {"sliding": (False, True, True)}),
    (SANDWICH, {"turned": (True, True, False)}),
    (SANDWICH, {"local_rope": None}),
    (SANDWICH, {"local_rope": Rope(200.0)}),
    (SANDWICH, {"pre_norm": False}),
    (SANDWICH, {"qk_norm": "none"}),
    (SANDWICH, {"softcap": 2.0}),
    (SANDWICH, {"final_softcap": None}),
    (TINY, {"post_norm": True, "pre_norm": False}),
    (TINY, {"norm": "plus_one"}),
    (TINY, {"activation": "gelu_tanh"}),
    (TINY, {"embed_scaled": True}),
    (TINY, {"query_scalar": 20.0}),
    (TINY, {"rope": {"partial": 0.5}}),
    (TINY, {"rope": {"magnitude": 1.1}}),
    (YARN, {"rope": {"factor": 2.0}}),
    (YARN, {"rope": {"beta_fast": 8.0}}),
    (YARN, {"rope": {"beta_slow": 2.0}}),
    (YARN, {"rope": {"truncate": False}}),
    (YARN, {"rope": {"original_context": 256}}),
    (LONG, {"rope": {"divisors": (1.0,) * 8}}),
    (dataclasses.replace(TINY, dtype="bfloat16"), {"stream": "float32"}),
]
# Other sizes are other arrays: parity with transformers covers them, and weights of other shapes are refused.
SIZE_FIELDS = {"vocab", "layers", "embed", "mlp", "heads", "kv_heads", "head_dim"}
# The longest prompt that is accepted, the architecture's name in config.json; neither is arithmetic.
NOT_ARITHMETIC = {"context", "family"}
# The type in which weights are loaded: see `test_dtype_is_that_of_the_loaded_weights`.
LOADING = {"dtype"}


def test_every_field_is_accounted_for():
    mutated = {field for _, changes in MUTATIONS for field in changes}
    assert mutated | SIZE_FIELDS | NOT_ARITHMETIC | LOADING == {f.name for f in dataclasses.fields(ModelConfig)}
    of_rope = {field for _, changes in MUTATIONS for field in changes.get("rope", ())}
    assert of_rope == {f.name for f in dataclasses.fields(Rope)}


@pytest.mark.parametrize(("config", "changes"), MUTATIONS)
def test_a_field_changes_the_logits(config, changes):
    tokens, valid = padded(config, [48])
    params = random_params(config)
    before = logits_of(config, params, tokens, valid)
    other = replace(config, **changes)
    after = logits_of(other, random_params(other) if "post_norm" in changes else params, tokens, valid)
    assert np.abs(before - after).max() > 1e-4


@pytest.mark.parametrize("field", sorted(SIZE_FIELDS))
def test_weights_of_another_size_are_refused(field):
    config = dataclasses.replace(TINY, **{field: {"heads": 8, "kv_heads": 4}.get(field, getattr(TINY, field) + 2)})
    params, rows = random_params(TINY), padded(TINY, [4])
    with pytest.raises((flax.errors.ScopeParamShapeError, ValueError), match=r"shape|size|length"):
        jax.eval_shape(lambda: forward(config, params, *rows))


@pytest.mark.parametrize("changes", [{"context": 4}, {"family": "mistral"}])
def test_context_and_family_are_no_arithmetic(changes):
    tokens, valid = padded(TINY, [48])
    params = random_params(TINY)
    before, after = (logits_of(c, params, tokens, valid) for c in (TINY, dataclasses.replace(TINY, **changes)))
    np.testing.assert_array_equal(before, after)


def test_dtype_is_that_of_the_loaded_weights():
    tokens, valid = padded(TINY, [48])
    half = dataclasses.replace(TINY, dtype="bfloat16")
    params = random_params(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    coarse, fine = logits_of(half, params, tokens, valid), logits_of(TINY, random_params(TINY), tokens, valid)
    assert coarse.dtype == np.float32
    assert 1e-4 < np.abs(coarse - fine).max() < 0.3


@pytest.mark.parametrize(
    "changes", [{}, {"tied": True}, {"qkv_bias": True, "o_bias": True}, {"mlp_bias": True, "dtype": "bfloat16"}]
)
def test_init_has_the_shapes_of_the_table(changes):
    config = dataclasses.replace(TINY, **changes)
    made, expected = flatten(jax.eval_shape(lambda: init(config))), flatten(shapes(config))
    assert {path: (a.shape, a.dtype) for path, a in made.items()} == {
        path: (a.shape, a.dtype) for path, a in expected.items()
    }


def test_init_follows_the_kind_of_a_weight_and_not_what_it_needs():
    config = dataclasses.replace(TINY, qkv_bias=True, o_bias=True, mlp_bias=True)
    made = flatten(init(config))
    for path, weight in weights(config).items():
        drawn = {"norm": {1.0}, "bias": {0.0}}.get(weight.kind)
        assert drawn is None or set(np.unique(made[path])) == drawn, path
        assert weight.kind != "map" or 0.01 < np.std(made[path]) < 0.03, path
    assert {w.kind for w in TABLE if not w.linear} == {"map", "norm", "bias"}


def test_init_is_random_by_seed():
    made = jax.jit(lambda seed: init(TINY, seed))
    first, again, other = (made(seed)["layers"]["q"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    assert np.std(first) == pytest.approx(0.02, rel=0.1)
    assert np.abs(first[0] - first[1]).max() > 0.01


# Rows and padding


@pytest.mark.parametrize("config", [TINY, SCALED_WINDOW], ids=["llama", "llama3 rope, window"])
@pytest.mark.parametrize("length", [1, 2, 17, 48])
def test_a_row_alone_equals_the_row_in_a_padded_batch(config, length):
    params = random_params(config)
    tokens, valid = padded(config, [length, 48, 3], slots=53)
    together = np.asarray(logits_of(config, params, tokens, valid))
    alone = logits_of(config, params, tokens[:1, 53 - length :], np.ones((1, length), bool))
    np.testing.assert_allclose(together[0, 53 - length :], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [TINY, WINDOW], ids=["llama", "window"])
def test_padding_is_finite_and_without_influence(config):
    params = random_params(config)
    tokens, valid = padded(config, [48, 0, 5])
    logits = np.asarray(logits_of(config, params, tokens, valid))
    assert np.isfinite(logits).all()
    other = np.where(valid, tokens, (tokens + 7) % config.vocab)
    np.testing.assert_array_equal(logits[valid], np.asarray(logits_of(config, params, other, valid))[valid])


def test_positions_count_without_padding():
    valid = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(positions_of(valid), [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_mask_is_what_its_words_say(window):
    valid = padded(TINY, [6, 4, 0], slots=7)[1]
    valid[1, 4] = False  # a gap: windows count positions, of which it has none
    first = 2
    mask = np.asarray(Slots(valid, first).queries(5).mask(window))
    for b in range(3):
        for i, t in enumerate(range(first, 7)):
            for s in range(7):
                seen = valid[b, s] and s <= t and (window is None or valid[b, s + 1 : t + 1].sum() < window)
                assert mask[b, i, s] == seen


def test_padding_sees_nothing_and_gets_zero():
    x = np.ones((2, 4, 2, 8), np.float32)
    valid = np.array([[0, 0, 1, 1], [0, 0, 0, 0]], bool)
    heads = attend(x, x.swapaxes(1, 2), x.swapaxes(1, 2), Slots(valid).queries(4))
    np.testing.assert_array_equal(heads, np.broadcast_to(valid[:, :, None], (2, 4, 16)))


# The cache and the last positions


def test_cached_equals_uncached():
    config = SCALED_WINDOW
    params = random_params(config)
    tokens, valid = padded(config, [52, 40, 1])
    whole = np.asarray(logits_of(config, params, tokens, valid))
    model = Transformer(config)

    @jax.jit
    def step(part, cache, slot):
        return model.apply({"params": params}, part, Slots(valid, slot), cache)

    cache, out = new_cache(config, 3, 52), []
    for start, stop in [(0, 45), (45, 51), (51, 52)]:
        logits, cache = step(tokens[:, start:stop], cache, start)
        out.append(logits)
    np.testing.assert_allclose(np.concatenate(out, 1)[valid], whole[valid], atol=1e-5, rtol=0)
    assert cache.length == 52


@pytest.mark.parametrize("last", [0, 1, 5])
def test_last_keeps_the_final_positions(last):
    params = random_params(TINY)
    tokens, valid = padded(TINY, [12, 7])
    whole = np.asarray(logits_of(TINY, params, tokens, valid))
    kept = np.asarray(logits_of(TINY, params, tokens, valid, last=last))
    assert kept.shape == (2, last, TINY.vocab)
    np.testing.assert_allclose(kept, whole[:, 12 - last :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_unembedding_of_the_normed_stream(tied):
    config = dataclasses.replace(TINY, tied=tied)
    x = np.random.default_rng(0).standard_normal((2, TINY.embed)).astype(np.float32)
    matrix = hf_weights(config)["model.embed_tokens.weight" if tied else "lm_head.weight"]
    logits = unembed(config, x, unembedding(config, random_params(config)))
    np.testing.assert_allclose(logits, x @ matrix.T, atol=1e-5, rtol=0)


# The compiled program


def test_program_does_not_grow_with_layers():
    def instructions(layers):
        config = dataclasses.replace(TINY, layers=layers)
        tokens = jax.ShapeDtypeStruct((2, 48), "int32")
        valid = jax.ShapeDtypeStruct((2, 48), "bool")
        return logits_of.lower(config, shapes(config), tokens, valid).compile().as_text().count(" = ")

    assert abs(instructions(8) - instructions(2)) < 0.02 * instructions(2)


def test_one_compilation_for_rows_of_one_shape():
    f = jax.jit(lambda *arguments: forward(TINY, *arguments))
    for seed, lengths in enumerate([[48, 3], [1, 48], [0, 20], [48, 48]]):
        f(random_params(TINY, seed), *padded(TINY, lengths, seed, slots=48))
    assert f._cache_size() == 1
    f(random_params(TINY), *padded(TINY, [47]))
    assert f._cache_size() == 2


def test_gradient_is_finite_and_reaches_every_weight():
    config = dataclasses.replace(BIASED, window=8)
    tokens, valid = padded(config, [20, 0, 7])
    loss = jax.jit(jax.grad(lambda p: jnp.square(forward(config, p, tokens, valid)).mean(where=valid[..., None])))
    for path, leaf in jax.tree.leaves_with_path(loss(random_params(config))):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)
