"""Taps: what is read, what an edit does, and what both cost, against a slow forward pass in NumPy float64.

B batch, T position, L layers, F features of a tap
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import SCALED, TINY, hf_weights, logits_of, padded, random_params, replace

from jaxsafe.kernels.forward import capture
from jaxsafe.model.attention import Slots
from jaxsafe.model.taps import EMBED, FINAL, OUTSIDE, TAPS, At, Edit, Gram, SquareSum, at, edit
from jaxsafe.model.transformer import Transformer, forward, variables
from jaxsafe.model.weights import shapes

EVERY = (*TAPS, *OUTSIDE)
TRAINED = dataclasses.replace(SCALED, qkv_bias=True, o_bias=True, mlp_bias=True, tied=True)
LINEAR_WINDOW = replace(TINY, rope={"kind": "linear", "factor": 3.0, "theta": 500.0}, window=9, norm_eps=1e-6)
captured = jax.jit(capture, static_argnames=("config", "taps"))


# The slow reference: one row at a time, without padding; weights by their Hugging Face names


def rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def frequency(rope, pair, head_dim):
    """Radians a position, the stretch of `llama3` in its published form, by wavelength."""
    f = rope.theta ** (-2 * pair / head_dim)
    if rope.kind == "linear":
        return f / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * np.pi / f
        if wavelength > rope.original_context / rope.low_freq_factor:
            return f / rope.factor
        if wavelength >= rope.original_context / rope.high_freq_factor:
            smooth = rope.original_context / wavelength - rope.low_freq_factor
            smooth /= rope.high_freq_factor - rope.low_freq_factor
            return (1 - smooth) * f / rope.factor + smooth * f
    return f


def turned(rope, x):
    """`x` [T, H]: feature i and i + H/2 are the two parts of a complex number, turned by position."""
    half = x.shape[1] // 2
    rates = np.array([frequency(rope, pair, 2 * half) for pair in range(half)])
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.arange(len(x))[:, None] * rates)
    return np.concatenate([z.real, z.imag], 1)


def attention(q, k, v, window):
    """One head: q, k, v [T, H]."""
    out = np.zeros_like(q)
    for t in range(len(q)):
        first = 0 if window is None else max(0, t - window + 1)
        scores = k[first : t + 1] @ q[t] / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[t] = weights @ v[first : t + 1] / weights.sum()
    return out


def reference(config, tensors, tokens, change=lambda tap, layer, x: x):
    """Logits [T, V] of one unpadded row `tokens` [T] and {tap: [L, T, F]}; `change` edits at the taps."""
    w = {name: array.astype(np.float64) for name, array in tensors.items()}
    seen = {tap: [] for tap in EVERY}

    def tap(name, layer, x):
        x = change(name, layer, x)
        seen[name].append(x)
        return x

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    x = tap(EMBED, 0, w["model.embed_tokens.weight"][tokens])
    for layer in range(config.layers):
        at_layer = f"model.layers.{layer}."
        h = tap("attn_in", layer, rms(x, w[f"{at_layer}input_layernorm.weight"], config.norm_eps))
        q, k, v = (tap(name, layer, linear(h, f"{at_layer}self_attn.{name}_proj")) for name in "qkv")
        q, k, v = (array.reshape(len(x), -1, config.head_dim) for array in (q, k, v))
        heads = []
        for head in range(config.heads):
            shared = head * config.kv_heads // config.heads
            turn = functools.partial(turned, config.rope)
            heads.append(attention(turn(q[:, head]), turn(k[:, shared]), v[:, shared], config.window))
        h = tap("heads", layer, np.concatenate(heads, 1))
        h = tap("o", layer, linear(h, f"{at_layer}self_attn.o_proj"))
        x = x + tap("attn_out", layer, h)
        h = tap("mlp_in", layer, rms(x, w[f"{at_layer}post_attention_layernorm.weight"], config.norm_eps))
        gate, up = (linear(h, f"{at_layer}mlp.{name}_proj") for name in ("gate", "up"))
        h = tap("mlp_hidden", layer, gate / (1 + np.exp(-gate)) * up)
        h = tap("down", layer, linear(h, f"{at_layer}mlp.down_proj"))
        x = tap("resid", layer, x + tap("mlp_out", layer, h))
    x = tap(FINAL, 0, rms(x, w["model.norm.weight"], config.norm_eps))
    head = w["model.embed_tokens.weight" if config.tied else "lm_head.weight"]
    return x @ head.T, {name: np.stack(parts) for name, parts in seen.items()}


def edited(values, row):
    """The `change` of `reference` for the row of that number, from `values` {tap: Edit}, by the definition."""

    def change(tap, layer, x):
        if tap not in values:
            return x
        e = jax.tree.map(lambda field: np.asarray(field, np.float64), values[tap])
        gate, start = (field[layer, row if field.shape[1] > 1 else 0] for field in (e.gate, e.start))
        out = x.copy()
        for position in range(len(x)):
            if position >= start:
                along = x[position] @ e.ablate[layer]
                out[position] = x[position] + gate * (e.add[layer] - along * e.ablate[layer])
        return out

    return change


def width(config, tap):
    keys = config.kv_heads * config.head_dim
    features = {"q": config.heads * config.head_dim, "k": keys, "v": keys, "mlp_hidden": config.mlp}
    return (features | {"heads": features["q"]}).get(tap, config.embed)


def random_edit(config, tap, rows=1, seed=0):
    """An edit of every layer: another vector, direction, gate and start for each layer or row."""
    generator = np.random.default_rng(seed)
    shape = (config.layers, width(config, tap))
    direction = generator.standard_normal(shape)
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    gate = generator.uniform(-1, 1, (config.layers, rows))
    start = generator.integers(0, 6, (config.layers, rows))
    arrays = (generator.standard_normal(shape) / 4, direction, gate)
    whole = Edit(*(jnp.asarray(a, jnp.float32) for a in arrays), jnp.asarray(start, jnp.int32))
    return jax.tree.map(lambda field: field[:1], whole) if tap in OUTSIDE else whole


# What is read


@pytest.mark.parametrize("config", [TRAINED, LINEAR_WINDOW], ids=["llama3 rope, biases, tied", "linear rope, window"])
def test_logits_and_every_reading_equal_the_slow_reference(config):
    tensors, params = hf_weights(config), random_params(config)
    tokens, valid = padded(config, [50, 21])
    logits = np.asarray(logits_of(config, params, tokens, valid))
    read = {tap: np.asarray(a) for tap, a in captured(config, params, tokens, valid, taps=EVERY).items()}
    assert set(read) == set(EVERY)
    for row in range(2):
        expected, seen = reference(config, tensors, tokens[row, valid[row]])
        np.testing.assert_allclose(logits[row, valid[row]], expected, atol=1e-5, rtol=0)
        for tap in TAPS:
            assert read[tap].shape == (config.layers, 2, 50, width(config, tap))
            np.testing.assert_allclose(read[tap][:, row, valid[row]], seen[tap], atol=2e-5, rtol=1e-5, err_msg=tap)
        for tap in OUTSIDE:
            assert read[tap].shape == (2, 50, config.embed)
            np.testing.assert_allclose(read[tap][row, valid[row]], seen[tap][0], atol=2e-5, rtol=1e-5, err_msg=tap)


def test_only_what_is_asked_for_is_read():
    params, rows = random_params(TINY), padded(TINY, [5])
    assert set(captured(TINY, params, *rows)) == {"resid"}
    assert set(captured(TINY, params, *rows, taps=("final",))) == {"final"}
    assert set(captured(TINY, params, *rows, taps=("heads", "mlp_in"))) == {"heads", "mlp_in"}


def test_linen_users_read_the_same():
    params, (tokens, valid) = random_params(TINY), padded(TINY, [8, 3])
    arguments = ({"params": params}, tokens, Slots(valid))
    model = Transformer(TINY)
    (logits, _), state = jax.jit(
        lambda: model.apply(*arguments, capture_intermediates=at("mlp_in"), mutable=["intermediates"])
    )()
    expected = captured(TINY, params, tokens, valid, taps=("mlp_in",))["mlp_in"]
    np.testing.assert_allclose(state["intermediates"]["layers"]["mlp_in"]["read"][0], expected, atol=1e-5)
    np.testing.assert_allclose(logits, logits_of(TINY, params, tokens, valid), atol=1e-5)


@pytest.mark.parametrize("tap", ["residual", "layers", "Resid"])
def test_an_unknown_tap_is_refused(tap):
    params, rows = random_params(TINY), padded(TINY, [5])
    e = random_edit(TINY, "resid")
    for attempt in (
        lambda: capture(TINY, params, *rows, taps=(tap,)),
        lambda: capture(TINY, params, *rows, reduce={tap: At(np.zeros((1, 1), np.int32))}),
        lambda: capture(TINY, params, *rows, edits={tap: e}),
        lambda: forward(TINY, params, *rows, edits={tap: e}),
        lambda: at("resid", tap),
    ):
        with pytest.raises(ValueError, match=f"{tap}.*attn_in.*final") as error:
            attempt()
        assert "\n" not in str(error.value)


# What an edit does


@pytest.mark.parametrize("tap", EVERY)
def test_an_edit_is_its_equation(tap):
    tensors, params = hf_weights(TINY), random_params(TINY)
    tokens, valid = padded(TINY, [18, 11, 7])
    edits = {tap: random_edit(TINY, tap, rows=3)}
    logits = np.asarray(logits_of(TINY, params, tokens, valid, edits))
    read = np.asarray(captured(TINY, params, tokens, valid, taps=(tap,), edits=edits)[tap])
    plain = np.asarray(logits_of(TINY, params, tokens, valid))
    for row in range(3):
        expected, seen = reference(TINY, tensors, tokens[row, valid[row]], edited(edits, row))
        np.testing.assert_allclose(logits[row, valid[row]], expected, atol=1e-5, rtol=0)
        ours = read[row, valid[row]][None] if tap in OUTSIDE else read[:, row, valid[row]]
        np.testing.assert_allclose(ours, seen[tap], atol=2e-5, rtol=1e-5)
        assert np.abs(expected - plain[row, valid[row]]).max() > 1e-3


def test_edits_at_all_taps_together():
    tensors, params = hf_weights(LINEAR_WINDOW), random_params(LINEAR_WINDOW)
    tokens, valid = padded(LINEAR_WINDOW, [20, 13])
    edits = {tap: random_edit(LINEAR_WINDOW, tap, rows=2, seed=seed) for seed, tap in enumerate(EVERY)}
    logits = np.asarray(logits_of(LINEAR_WINDOW, params, tokens, valid, edits))
    for row in range(2):
        expected, _ = reference(LINEAR_WINDOW, tensors, tokens[row, valid[row]], edited(edits, row))
        np.testing.assert_allclose(logits[row, valid[row]], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_the_identity_edit_changes_no_bit(dtype):
    config = dataclasses.replace(TINY, dtype=dtype)
    params, (tokens, valid) = random_params(config), padded(config, [20, 0, 9])
    plain = logits_of(config, params, tokens, valid)
    zero = jnp.zeros((config.layers, config.embed))
    for nothing in (edit(add=zero), edit(ablate=zero), edit(add=zero + 3, ablate=zero, gate=0.0)):
        np.testing.assert_array_equal(plain, logits_of(config, params, tokens, valid, {"resid": nothing}))
    for tap in EVERY:
        nothing = edit(add=jnp.zeros((1 if tap in OUTSIDE else config.layers, width(config, tap))))
        np.testing.assert_array_equal(plain, logits_of(config, params, tokens, valid, {tap: nothing}))
    late = edit(add=zero + 3, start=20)
    np.testing.assert_array_equal(plain, logits_of(config, params, tokens, valid, {"attn_out": late}))


def test_ablation_removes_the_component_and_nothing_else():
    params, (tokens, valid) = random_params(TINY), padded(TINY, [20, 9])
    direction = np.random.default_rng(0).standard_normal((TINY.layers, TINY.embed))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    edits = {"mlp_in": edit(ablate=jnp.asarray(direction, jnp.float32))}
    after = np.asarray(captured(TINY, params, tokens, valid, taps=("mlp_in",), edits=edits)["mlp_in"])
    before = np.asarray(captured(TINY, params, tokens, valid, taps=("mlp_in",))["mlp_in"])
    assert np.abs(np.einsum("lbtd,ld->lbt", before, direction)).max() > 0.5
    assert np.abs(np.einsum("lbtd,ld->lbt", after, direction)).max() < 1e-5
    others = np.eye(TINY.embed) - np.einsum("d,e->de", direction[0], direction[0])
    np.testing.assert_allclose(after[0] @ others, before[0] @ others, atol=1e-5)


def test_an_edit_keeps_to_its_layer_rows_and_positions():
    params, (tokens, valid) = random_params(TINY), padded(TINY, [20, 14])
    add = jnp.zeros((TINY.layers, TINY.embed)).at[1].set(1.0)
    edits = {"resid": edit(add=add, gate=jnp.array([0.0, -0.5]), start=jnp.array([0, 6]))}
    before, after = (
        np.asarray(captured(TINY, params, tokens, valid, taps=("resid",), edits=e)["resid"]) for e in ({}, edits)
    )
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    # Row 1 has six slots of padding: position 6 is slot 12.
    np.testing.assert_array_equal(after[:, 1, 6:12], before[:, 1, 6:12])
    np.testing.assert_allclose(after[1, 1, 12:], before[1, 1, 12:] - 0.5, atol=1e-6)
    assert np.abs(after[2, 1, 12:] - before[2, 1, 12:]).min(0).max() > 1e-3


def test_one_program_for_all_edits_of_a_tap():
    params, rows = random_params(TINY), padded(TINY, [10, 4])
    f = jax.jit(lambda e: forward(TINY, params, *rows, {"resid": e}))
    zero = jnp.zeros((TINY.layers, TINY.embed))
    for e in (
        edit(add=zero),
        edit(add=zero + 1, gate=0.25),
        edit(ablate=zero.at[:, 0].set(1), start=3),
        edit(add=zero - 1, ablate=zero.at[1, 2].set(1), gate=-1.0, start=jnp.int32(2)),
        edit(add=zero.at[0].set(5), gate=jnp.float32(2)),
    ):
        f(e)
    assert f._cache_size() == 1
    f(edit(add=zero, gate=jnp.ones(2)))
    assert f._cache_size() == 2


def test_edit_builds_every_field():
    add = jnp.arange(6.0).reshape(3, 2)
    e = edit(add=add, gate=jnp.array([1.0, 0.0]), start=4)
    np.testing.assert_array_equal(e.add, add)
    np.testing.assert_array_equal(e.ablate, np.zeros((3, 2)))
    np.testing.assert_array_equal(e.gate, [[1, 0]] * 3)
    np.testing.assert_array_equal(e.start, [[4]] * 3)
    assert (e.gate.dtype, e.start.dtype) == (jnp.float32, jnp.int32)
    np.testing.assert_array_equal(edit(ablate=add).add, np.zeros((3, 2)))
    with pytest.raises(ValueError, match="add or ablate"):
        edit(gate=0.5)


def test_the_gradient_of_an_edit_is_that_of_the_activation():
    """By central differences of the float64 reference: at one position, and summed from a position on."""
    tensors, params = hf_weights(TINY), random_params(TINY)
    tokens, valid = padded(TINY, [9], slots=12)
    probe = np.random.default_rng(5).standard_normal((9, TINY.vocab))

    def slow_loss(layer, feature, start, step):
        def change(tap, at_layer, x):
            x = x.copy()
            if (tap, at_layer) == ("resid", layer):
                x[start:, feature] += step
            return x

        return (reference(TINY, tensors, tokens[0, 3:], change)[0] * probe).sum()

    @jax.jit
    def gradient(start):
        def loss(add):
            logits = forward(TINY, params, tokens, valid, {"resid": edit(add=add, start=start)})
            return (logits[0, 3:] * probe.astype(np.float32)).sum()

        return jax.grad(loss)(jnp.zeros((TINY.layers, TINY.embed)))

    for start in (0, 5, 8):
        ours = gradient(start)
        for layer, feature in [(0, 3), (0, 30), (1, 7), (2, 0)]:
            high, low = (slow_loss(layer, feature, start, step) for step in (1e-5, -1e-5))
            assert ours[layer, feature] == pytest.approx((high - low) / 2e-5, rel=1e-3, abs=1e-4)


# Reductions at the tap


def test_reducers_equal_reductions_of_the_whole_capture():
    params, (tokens, valid) = random_params(TINY), padded(TINY, [20, 9, 14])
    generator = np.random.default_rng(0)
    slots = generator.integers(0, 20, (3, 4)).astype(np.int32)
    weight = (valid * generator.uniform(0, 2, valid.shape)).astype(np.float32)
    reduce = {"resid": At(slots), "mlp_hidden": SquareSum(weight)}
    taps = (*reduce, "mlp_in", FINAL)
    whole = {k: np.asarray(v, np.float64) for k, v in captured(TINY, params, tokens, valid, taps=taps).items()}
    ours = captured(TINY, params, tokens, valid, taps=taps, reduce=reduce | {FINAL: At(slots[:, :1])})
    assert {k: v.shape for k, v in ours.items()} == {
        "resid": (3, 3, 4, TINY.embed),
        "mlp_hidden": (3, TINY.mlp),
        "mlp_in": (3, 3, 20, TINY.embed),
        FINAL: (3, 1, TINY.embed),
    }
    rows = np.arange(3)[:, None]
    np.testing.assert_allclose(ours["resid"], whole["resid"][:, rows, slots], atol=1e-6)
    np.testing.assert_allclose(ours[FINAL], whole[FINAL][rows, slots[:, :1]], atol=1e-6)
    np.testing.assert_allclose(ours["mlp_in"], whole["mlp_in"], atol=1e-6)
    squares = np.einsum("lbtf,bt->lf", whole["mlp_hidden"] ** 2, weight)
    np.testing.assert_allclose(ours["mlp_hidden"], squares, rtol=1e-5, atol=1e-5)


def test_a_reading_is_taken_behind_the_edit():
    params, (tokens, valid) = random_params(TINY), padded(TINY, [6, 6])
    last = At(np.full((2, 1), 5, np.int32))
    add = {"resid": edit(add=jnp.full((TINY.layers, TINY.embed), 2.0))}
    plain, after = (
        captured(TINY, params, tokens, valid, taps=("resid",), edits=e, reduce={"resid": last})["resid"]
        for e in ({}, add)
    )
    np.testing.assert_allclose(after[0], plain[0] + 2, atol=1e-5)


def test_sums_of_bfloat16_are_kept_in_float32():
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (8, 512, 3)), jnp.bfloat16)
    total = SquareSum(jnp.ones((8, 512)))(x)
    assert total.dtype == jnp.float32
    exact = np.asarray(x, np.float64) ** 2
    np.testing.assert_allclose(total, exact.sum((0, 1)), rtol=1e-4)


def test_outer_products_of_bfloat16_are_exact():
    """What they add up to is as near the true sum as float32 sums are, not as bfloat16 products would be."""
    x = jax.random.normal(jax.random.key(0), (3, 40, 24)).astype(jnp.bfloat16)
    weight = (jax.random.uniform(jax.random.key(1), (3, 30)) > 0.4).astype(jnp.float32)
    exact = np.asarray(x, np.float64)[:, 10:]
    expected = np.einsum("btf,btg,bt->fg", exact, exact, np.asarray(weight, np.float64))
    got = jax.jit(lambda gram, x: gram(x))(Gram(weight), x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_reducing_at_the_tap_holds_no_stack_of_layers():
    tokens, valid = (jax.ShapeDtypeStruct((4, 32), dtype) for dtype in ("int32", "bool"))
    one_layer = 4 * 32 * 512 * 4

    def at_the_tap(config, params, tokens, valid):
        reduce = {"mlp_hidden": SquareSum(valid.astype(jnp.float32))}
        return capture(config, params, tokens, valid, ("mlp_hidden",), reduce=reduce)["mlp_hidden"]

    def afterwards(config, params, tokens, valid):
        whole = capture(config, params, tokens, valid, ("mlp_hidden",))["mlp_hidden"]
        return jax.vmap(SquareSum(valid.astype(jnp.float32)))(whole)

    def held(f, layers):
        config = dataclasses.replace(TINY, layers=layers, mlp=512)
        compiled = jax.jit(f, static_argnums=0).lower(config, shapes(config), tokens, valid).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert held(afterwards, 40) > 40 * one_layer
    assert held(at_the_tap, 40) < 8 * one_layer
    assert held(at_the_tap, 40) - held(at_the_tap, 20) < one_layer


# What an unused reading costs


def instructions(f, *arguments):
    return sum(" = " in line for line in jax.jit(f).lower(*arguments).compile().as_text().splitlines())


def test_an_unused_capture_leaves_the_program_unchanged():
    tokens, valid = (jax.ShapeDtypeStruct((2, 48), dtype) for dtype in ("int32", "bool"))

    def logits(params, tokens, valid, **read):
        out = Transformer(TINY).apply(variables(params), tokens, Slots(valid), **read)
        return out[0][0] if read else out[0]

    read = {"capture_intermediates": at(*EVERY), "mutable": ["intermediates"]}
    plain = instructions(logits, shapes(TINY), tokens, valid)
    assert instructions(functools.partial(logits, **read), shapes(TINY), tokens, valid) == plain
    used = functools.partial(capture, TINY, taps=("mlp_hidden",))
    assert instructions(used, shapes(TINY), tokens, valid) != plain


def test_a_capture_makes_no_logits():
    config = dataclasses.replace(TINY, vocab=977)
    tokens, valid = (jax.ShapeDtypeStruct((2, 48), dtype) for dtype in ("int32", "bool"))
    traced = [
        str(jax.make_jaxpr(functools.partial(f, config))(shapes(config), tokens, valid)) for f in (capture, forward)
    ]
    assert ["f32[2,48,977]" in text for text in traced] == [False, True]
