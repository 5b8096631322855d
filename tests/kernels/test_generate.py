"""Generation against a loop that runs the whole text again for every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import new_cache
from tiny import decoding, random_rows, tiny_config, tiny_params, tiny_tokenizer

from jaxsafe.chat.model import ChatModel
from jaxsafe.kernels import generate as module
from jaxsafe.kernels.generate import generate, prefill_and_decode
from jaxsafe.kernels.sampling import (
    Sampling,
    as_arrays,
    drawing,
    next_token,
    row_seeds,
    sampling_keys,
)
from jaxsafe.model.attention import Slots
from jaxsafe.model.taps import edit
from jaxsafe.model.transformer import Transformer, forward, variables
from jaxsafe.model.weights import shapes, shardings
from jaxsafe.parallel import parse_mesh
from jaxsafe.rows import pad_rows

NEW = 12
ROWS = random_rows([5, 16, 8, 11])
SAMPLED = {"temperature": 1.2, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2}
whole = jax.jit(forward, static_argnames=("config", "last"))


@pytest.fixture(scope="module")
def params():
    return tiny_params(tiny_config())


def uncached(config, params, rows, new, choose, edits=None):
    """Tokens [B, new] by a full forward pass a token; `choose(logits, step, texts)` picks the next ones."""
    batch = pad_rows(rows)
    length = batch.tokens.shape[1]
    tokens = np.pad(batch.tokens, [(0, 0), (0, new)])
    valid = np.pad(batch.valid, [(0, 0), (0, new)])
    for step in range(new):
        logits = whole(config, params, tokens, valid, edits)[:, length + step - 1]
        texts = [t[v] for t, v in zip(tokens, valid, strict=True)]
        tokens[:, length + step] = choose(np.asarray(logits), step, texts)
        valid[:, length + step] = True
    return tokens[:, length:]


def greedy(logits, step, texts):
    return logits.argmax(-1)


@functools.lru_cache
def free_run(config):
    """The greedy answers without an end-of-text token."""
    return uncached(config, tiny_params(config), ROWS, NEW, greedy)


WINDOWED = {"window": 7, "family": "mistral", "tied": True}


@pytest.mark.parametrize("changes", [{}, WINDOWED], ids=["llama", "mistral"])
def test_cached_greedy_is_uncached_greedy(changes):
    config = tiny_config(**changes)
    out = generate(config, tiny_params(config), pad_rows(ROWS), decoding(NEW))
    np.testing.assert_array_equal(out.tokens, free_run(config))
    np.testing.assert_array_equal(out.lengths, [NEW] * 4)
    assert out.tokens.dtype == out.lengths.dtype == jnp.int32


def test_the_window_that_is_tested_matters():
    config, wider = tiny_config(**WINDOWED), tiny_config(**WINDOWED | {"window": 8})
    assert (uncached(wider, tiny_params(config), ROWS, NEW, greedy) != free_run(config)).any(axis=1).all()


def test_cached_sampling_is_uncached_sampling(params):
    keys = sampling_keys(3, row_seeds(ROWS))
    sampling = as_arrays(Sampling(**SAMPLED))
    draw = jax.jit(next_token)

    def choose(logits, step, texts):
        penalised = logits.copy()
        for b, text in enumerate(texts):
            for token in set(text.tolist()):
                penalised[b, token] *= 1 / 1.2 if logits[b, token] > 0 else 1.2
        return draw(jnp.asarray(penalised), sampling, keys, jnp.int32(step))

    wanted = uncached(tiny_config(), params, ROWS, NEW, choose)
    out = generate(tiny_config(), params, pad_rows(ROWS), decoding(NEW, seed=3, **SAMPLED))
    np.testing.assert_array_equal(out.tokens, wanted)


def test_the_repetition_penalty_covers_prompt_and_answer(params):
    def choose(logits, step, texts):
        for b, text in enumerate(texts):
            for token in set(text.tolist()):
                logits[b, token] *= 1 / 1.7 if logits[b, token] > 0 else 1.7
        return logits.argmax(-1)

    def copied(logits, step, texts):
        return choose(logits.copy(), step, texts)

    wanted = uncached(tiny_config(), params, ROWS, NEW, copied)
    out = generate(tiny_config(), params, pad_rows(ROWS), decoding(NEW, repetition_penalty=1.7))
    np.testing.assert_array_equal(out.tokens, wanted)
    assert (wanted != free_run(tiny_config())).any()


def cut(tokens, eos, pad):
    """Tokens with everything behind the first end-of-text token replaced by `pad`, and the lengths before it."""
    out, lengths = np.full_like(tokens, pad), []
    for row, line in zip(out, tokens.tolist(), strict=True):
        n = next((i for i, token in enumerate(line) if token in eos), len(line))
        row[: n + 1] = line[: n + 1]
        lengths.append(n)
    return out, lengths


def test_an_answer_ends_with_the_first_of_several_end_tokens(params):
    free = free_run(tiny_config())
    for eos in ([free[0, 3], free[1, 5]], [free[0, 0], free[2, 7]], [free[3, NEW - 1], 1]):
        out = generate(tiny_config(), params, pad_rows(ROWS), decoding(NEW, eos=[int(e) for e in eos]))
        tokens, lengths = cut(free, eos, 0)
        assert min(lengths) < NEW
        np.testing.assert_array_equal(out.tokens, tokens)
        np.testing.assert_array_equal(out.lengths, lengths)


@pytest.mark.parametrize("options", [{}, {**SAMPLED, "seed": 5}], ids=["greedy", "sampled"])
def test_nats_are_those_of_the_answer_without_its_end(params, options):
    config = tiny_config()
    free = generate(config, params, pad_rows(ROWS), decoding(NEW, **options))
    ends = [int(free.tokens[0, 3]), int(free.tokens[2, 0])]
    found = generate(config, params, pad_rows(ROWS), decoding(NEW, eos=ends, **options))
    lengths = np.asarray(found.lengths).tolist()
    assert lengths[2] == 0 and 0 < min(lengths[:2]) < NEW
    for row, tokens, n, nats in zip(ROWS, np.asarray(found.tokens), lengths, found.nats, strict=True):
        text = (*row.ids, *tokens[:n].tolist())
        logits = np.asarray(whole(config, params, np.array([text]), np.ones((1, len(text)), bool)), np.float64)[0]
        total = np.log(np.exp(logits).sum(-1))
        slow = sum(total[i - 1] - logits[i - 1, text[i]] for i in range(len(row.ids), len(text)))
        np.testing.assert_allclose(nats, slow, atol=1e-4)


def test_the_loop_stops_with_the_last_answer(params, monkeypatch):
    steps = []

    def counted(logits, sampling, keys, step):
        jax.debug.callback(lambda n: steps.append(int(n)), step)
        return next_token(logits, sampling, keys, step)

    monkeypatch.setattr(module, "next_token", counted)
    # A program of its own, so that the counter stays out of the library's.
    run = jax.jit(lambda *given: prefill_and_decode.__wrapped__(*given), static_argnums=0)
    free = free_run(tiny_config())
    _, lengths = cut(free, free[:, 4], 0)
    draw = drawing(decoding(NEW, eos=free[:, 4].tolist()), row_seeds(ROWS))
    out = run(tiny_config(), params, pad_rows(ROWS), draw)
    jax.effects_barrier()
    np.testing.assert_array_equal(out.lengths, lengths)
    assert max(lengths) < NEW - 2
    assert sorted(steps) == list(range(max(lengths) + 1))


@pytest.mark.parametrize("options", [{}, {**SAMPLED, "seed": 5}], ids=["greedy", "sampled"])
def test_a_row_answers_alike_alone_in_company_and_in_any_order(params, options):
    config = tiny_config()
    together = generate(config, params, pad_rows(ROWS), decoding(NEW, **options))
    order = [2, 0, 3, 1]
    shuffled = generate(config, params, pad_rows([ROWS[i] for i in order]), decoding(NEW, **options))
    np.testing.assert_array_equal(shuffled.tokens, together.tokens[np.array(order)])
    padded = generate(config, params, pad_rows(ROWS, length=24, count=6), decoding(NEW, eos=[1], **options))
    np.testing.assert_array_equal(padded.tokens[:4], together.tokens)
    # A row of nothing but padding answers nothing.
    np.testing.assert_array_equal(padded.tokens[4:], 0)
    np.testing.assert_array_equal(padded.lengths, [NEW] * 4 + [0] * 2)
    for i, row in enumerate(ROWS):
        alone = generate(config, params, pad_rows([row], length=16), decoding(NEW, **options))
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])


def test_rows_of_padding_do_not_keep_the_loop_waiting(params):
    """With no padding row counted as done, the loop would run to the end."""
    free = free_run(tiny_config())
    out = generate(tiny_config(), params, pad_rows(ROWS[:1], length=16, count=4), decoding(NEW, eos=[int(free[0, 0])]))
    np.testing.assert_array_equal(out.lengths, 0)
    np.testing.assert_array_equal(out.tokens[0, 1:], 0)


def test_no_number_recompiles(params):
    config = tiny_config()
    add = jnp.ones((config.layers, config.embed))

    def run(rows=ROWS, strength=1.0, gate=1.0, start=0, **options):
        edits = {"resid": edit(add=strength * add, gate=jnp.full(4, gate), start=jnp.full(4, start))}
        return generate(config, params, pad_rows(rows, length=16, count=4), decoding(NEW, eos=[1], **options), edits)

    run()
    programs = prefill_and_decode._cache_size()
    run(strength=0.0, gate=-1.0, start=3)
    run(rows=ROWS[:3])
    run(rows=ROWS[1:2], temperature=1, top_k=3, repetition_penalty=2)
    run(temperature=0.7, top_p=0.5, repetition_penalty=1.3, seed=7)
    assert prefill_and_decode._cache_size() == programs


def test_what_a_gpu_is_told_is_known_and_changes_no_answer(params, monkeypatch):
    given = (tiny_config(), params, pad_rows(ROWS, length=16, count=4), decoding(NEW, eos=[1]))
    plain = generate(*given)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    before = module._on_gpu.cache_info().misses
    told = generate(*given)
    assert module._on_gpu.cache_info().misses == before + 1
    np.testing.assert_array_equal(told.tokens, plain.tokens)


EIGHT = random_rows([13, 16, 14, 15, 16, 13, 14, 15], seed=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chat(tokenizer):
    """A chat model of given parameters, whose answers end with a token that is none."""
    return lambda params, config=None, mesh=None: ChatModel("tiny", config or tiny_config(), params, tokenizer, mesh)


def test_the_number_of_rows_within_a_bucket_does_not_recompile(params, chat):
    eight = chat(params).answers(EIGHT, decoding(NEW), 8)
    programs = prefill_and_decode._cache_size()
    for n in (5, 6, 7):
        some = chat(params).answers(EIGHT[:n], decoding(NEW), 8)
        np.testing.assert_array_equal(some.tokens, eight.tokens[:n])
    assert prefill_and_decode._cache_size() == programs


def test_rows_in_several_batches_are_those_of_one(params, chat):
    for options in ({}, {**SAMPLED, "seed": 1}):
        one, some = (chat(params).answers(EIGHT, decoding(NEW, **options), size) for size in (8, 4))
        np.testing.assert_array_equal(some.tokens, one.tokens)


def test_samples_of_a_prompt_stand_together_and_differ(params, chat):
    heard = []
    three = chat(params).answers(EIGHT[:4], decoding(NEW, samples=3, temperature=1.5), 4, heard.append)
    assert three.tokens.shape == (12, NEW) and heard == [4, 4, 4]
    one = chat(params).answers(EIGHT[:4], decoding(NEW, temperature=1.5), 4)
    np.testing.assert_array_equal(three.tokens[::3], one.tokens)
    assert len({tuple(t) for t in three.tokens.tolist()}) == 12


def test_the_seed_decides(params):
    def run(seed):
        return np.asarray(
            generate(tiny_config(), params, pad_rows(ROWS), decoding(NEW, temperature=1.5, seed=seed)).tokens
        )

    np.testing.assert_array_equal(run(1), run(1))
    assert (run(1) != run(2)).any(axis=1).all()


@pytest.mark.parametrize("text", ["data:8", "data:4,model:2"])
def test_many_devices_answer_as_one_does(params, chat, text):
    config, mesh = tiny_config(), parse_mesh(text)
    placed = jax.device_put(params, shardings(config, mesh))
    assert not placed["layers"]["q"].sharding.is_fully_replicated
    for options in ({}, {**SAMPLED, "seed": 1}):
        one = chat(params).answers(EIGHT[:7], decoding(NEW, **options), 8)
        many = chat(placed, mesh=mesh).answers(EIGHT[:7], decoding(NEW, **options), 8)
        np.testing.assert_array_equal(many.tokens, one.tokens)


BIG = tiny_config(layers=8, heads=2, head_dim=64, context=2048)
BIG_ROWS, BIG_SLOTS = 4, 1024


def cache_bytes():
    return sum(a.nbytes for a in jax.tree.leaves(new_cache(BIG, BIG_ROWS, BIG_SLOTS)))


def test_a_decode_step_does_not_copy_the_cache():
    @functools.partial(jax.jit, donate_argnames="cache")
    def step(params, tokens, cache, valid, slot):
        return Transformer(BIG).apply(variables(params), tokens, Slots(valid, slot), cache)

    token, valid = jnp.zeros((BIG_ROWS, 1), jnp.int32), jnp.ones((BIG_ROWS, BIG_SLOTS), bool)
    cache = jax.eval_shape(lambda: new_cache(BIG, BIG_ROWS, BIG_SLOTS))
    compiled = step.lower(shapes(BIG), token, cache, valid, jnp.int32(5)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * cache_bytes()


def test_generation_holds_one_cache_and_little_more():
    batch = pad_rows(random_rows([8] * BIG_ROWS))
    draw = drawing(decoding(BIG_SLOTS - 7, eos=[1]), np.arange(BIG_ROWS))
    compiled = prefill_and_decode.lower(BIG, shapes(BIG), batch, draw).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.3 * cache_bytes()


def test_edits_act_on_generated_tokens(params):
    config = tiny_config()
    add = jnp.asarray(np.random.default_rng(0).standard_normal((config.layers, config.embed)), jnp.float32)
    lengths = jnp.array([len(row.ids) for row in ROWS])
    edits = {"resid": edit(add=add, gate=jnp.array([1.0, -1.0, 0.0, 2.0]), start=lengths)}
    out = np.asarray(generate(config, params, pad_rows(ROWS), decoding(NEW), edits).tokens)
    np.testing.assert_array_equal(out, uncached(config, params, ROWS, NEW, greedy, edits))
    free = free_run(config)
    # The edit begins with the first generated token, so the second is the first that can differ.
    np.testing.assert_array_equal(out[:, 0], free[:, 0])
    np.testing.assert_array_equal((out != free).any(axis=1), [True, True, False, True])


def test_a_prompt_that_leaves_no_room_in_the_context_is_refused(params, chat):
    config = tiny_config(context=20)
    rows = random_rows([8, 15])
    with pytest.raises(ValueError, match=r"15 prompt tokens \+ 6 new ones exceed the model's context of 20"):
        generate(config, params, pad_rows(rows), decoding(6))
    with pytest.raises(ValueError, match=r"prompt 1 needs 15 tokens \+ 6 new ones; the model's context is 20 tokens"):
        chat(params, config).answers(rows, decoding(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        ({"temperature": -1.0}, "temperature -1.0 is negative"),
        ({"top_k": -2}, "top_k -2 is negative"),
        ({"top_p": 0}, "top_p 0 is not in"),
        ({"repetition_penalty": -1}, "repetition_penalty -1 is not positive"),
    ],
)
def test_numbers_out_of_range_are_refused(params, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_config(), params, pad_rows(ROWS), decoding(**{"max_new_tokens": NEW} | options))
