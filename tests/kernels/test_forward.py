"""Tokens that all rows begin with are run once; every number is that of the whole prompts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import decoding, random_rows, tiny_config, tiny_params, tiny_tokenizer

from jaxsafe.chat.model import ChatModel
from jaxsafe.kernels.forward import capture, final_states, joined_states, prompt_inputs
from jaxsafe.kernels.generate import generate
from jaxsafe.kernels.likelihood import answer_nll, likelihood
from jaxsafe.kernels.steering import anchor_states, prefill_and_read
from jaxsafe.model.taps import edit
from jaxsafe.model.weights import shapes, shardings
from jaxsafe.parallel import parse_mesh, put_rows
from jaxsafe.rows import Row, in_order, pad_rows, run_batches, shared_tokens

P, NEW = 24, 8
SYSTEM = random_rows([P], seed=9)[0].ids
AFFIRMATIVE = jnp.array([11, 12, 13])
FAMILIES = pytest.mark.parametrize(
    "changes", [{}, {"window": 7, "family": "mistral", "tied": True}], ids=["llama", "mistral"]
)


def rows_behind(prefix, lengths, behind, seed=0):
    """Random rows behind `prefix`."""
    rest = random_rows(lengths, seed=seed, behind=behind)
    return [Row(prefix + row.ids, len(prefix) + row.instruction_end) for row in rest]


ROWS = rows_behind(SYSTEM, [9, 30, 4, 1, 17], [2, 5, 0, 0, 16])
SHARED = pad_rows(ROWS, count=6, shared=P)
WHOLE = dataclasses.replace(SHARED, shared=0)


def compiled(config, batch):
    """The pass over the prompts of a batch."""
    run = jax.jit(lambda params, batch: final_states(config, params, prompt_inputs(config, params, batch)))
    return run.lower(shapes(config), batch).compile()


@FAMILIES
def test_states_behind_the_shared_tokens_are_those_of_a_plain_pass(changes):
    config = tiny_config(**changes)
    params = tiny_params(config)
    ours = final_states(config, params, prompt_inputs(config, params, SHARED, slots=3))
    wanted = final_states(config, params, prompt_inputs(config, params, WHOLE))[:, P:]
    valid = SHARED.valid[:, P:]
    np.testing.assert_allclose(ours[valid], wanted[valid], atol=2e-5)
    other = pad_rows(rows_behind((*SYSTEM[:-1], 7), [9, 30, 4, 1, 17], [2, 5, 0, 0, 16]), count=6, shared=P)
    changed = final_states(config, params, prompt_inputs(config, params, other))
    assert (np.abs(changed[valid] - wanted[valid]).max(-1) > 1e-3).any(), "the shared tokens are not seen"


@FAMILIES
def test_a_joined_row_has_the_states_of_its_rows(changes):
    config, valid = tiny_config(**changes), SHARED.valid[:, P:]
    params = tiny_params(config)
    run = jax.jit(lambda params, batch: joined_states(config, params, batch))
    wanted = final_states(config, params, prompt_inputs(config, params, WHOLE))
    np.testing.assert_allclose(run(params, SHARED)[valid], wanted[:, P:][valid], atol=2e-5)
    assert np.isfinite(run(params, SHARED)).all(), "a row of nothing but padding"
    np.testing.assert_allclose(run(params, WHOLE), wanted, atol=1e-6)


@FAMILIES
def test_what_rules_read_of_shared_tokens_is_that_of_a_plain_pass(changes):
    config = tiny_config(**changes)
    ours, wanted = (
        prefill_and_read(config, tiny_params(config), batch, AFFIRMATIVE, 3, mean=True).states
        for batch in (SHARED, WHOLE)
    )
    for name in ("at_end", "change", "mean"):
        np.testing.assert_allclose(getattr(ours, name)[:, :5], getattr(wanted, name)[:, :5], atol=2e-5)
    rows = np.asarray(capture(config, tiny_params(config), WHOLE.tokens, WHOLE.valid)["resid"], np.float64)
    counted = WHOLE.valid & (np.arange(WHOLE.tokens.shape[1]) <= WHOLE.instruction_end[:, None])
    for row in range(5):
        np.testing.assert_allclose(ours.mean[:, row], rows[:, row, counted[row]].mean(1), atol=2e-5)


def test_shared_tokens_cost_one_row():
    config = tiny_config(layers=8)
    joined = jax.jit(lambda params, batch: joined_states(config, params, batch)).lower(shapes(config), SHARED).compile()
    slots, whole = SHARED.tokens.shape[1], operations(compiled(config, WHOLE))
    for program in (compiled(config, SHARED), joined):
        assert operations(program) < 1.15 * whole * (P + 6 * (slots - P)) / (6 * slots)


def operations(program):
    """How many a compiled program does."""
    return program.cost_analysis()["flops"]


@FAMILIES
def test_answers_are_those_of_whole_prompts(changes):
    config = tiny_config(**changes)
    params = tiny_params(config)
    for options in ({}, {"temperature": 1.3, "top_k": 40, "repetition_penalty": 1.2, "seed": 3}):
        ours, wanted = (generate(config, params, batch, decoding(NEW, **options)) for batch in (SHARED, WHOLE))
        np.testing.assert_array_equal(ours.tokens, wanted.tokens)
        np.testing.assert_array_equal(ours.lengths, wanted.lengths)
    assert len({tuple(t) for t in np.asarray(ours.tokens[:5]).tolist()}) == 5


def test_edits_reach_shared_tokens_too():
    config = tiny_config()
    add = jnp.asarray(np.random.default_rng(0).standard_normal((config.layers, config.embed)), jnp.float32)
    for start in (0, 10, P + 3):
        edits = {"resid": edit(add=add, gate=jnp.linspace(-2, 2, 6), start=jnp.full(6, start))}
        ours, wanted = (generate(config, tiny_params(config), batch, decoding(NEW), edits) for batch in (SHARED, WHOLE))
        np.testing.assert_array_equal(ours.tokens, wanted.tokens)


@FAMILIES
def test_steering_reads_the_same_states(changes):
    config = tiny_config(**changes)
    params = tiny_params(config)
    ours, wanted = (anchor_states(config, params, batch, AFFIRMATIVE) for batch in (SHARED, WHOLE))
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(a[:5], b[:5], atol=2e-5)
    caches = [prefill_and_read(config, params, batch, AFFIRMATIVE, 5).cache for batch in (SHARED, WHOLE)]
    seen = np.pad(SHARED.valid, [(0, 0), (0, 3)], constant_values=True)[:5]
    for a, b in zip(*map(jax.tree.leaves, caches), strict=True):
        assert a.shape == b.shape
        a, b = (np.asarray(x)[:, :5, :, : seen.shape[1]].transpose(1, 3, 0, 2, 4)[seen] for x in (a, b))
        np.testing.assert_allclose(a, b, atol=2e-5)


@FAMILIES
def test_likelihoods_are_those_of_whole_rows(changes):
    config = tiny_config(**changes)
    params = tiny_params(config)
    for run in (
        lambda batch: answer_nll(config, params, batch, block=4),
        lambda batch: answer_nll(config, params, batch, last=20),
        lambda batch: likelihood(config, params, batch, np.arange(8, 14, dtype=np.int32)),
    ):
        ours, wanted = run(SHARED), run(WHOLE)
        np.testing.assert_allclose(ours[0][:5], wanted[0][:5], rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(ours[1][:5], wanted[1][:5])


def test_devices_share_the_tokens_too(tmp_path):
    config, mesh = tiny_config(), parse_mesh("data:4,model:2")
    params = tiny_params(config)
    placed = jax.device_put(params, shardings(config, mesh))
    rows = rows_behind(SYSTEM, [9, 12, 11, 10, 12, 9, 11], [0] * 7)
    tokenizer = tiny_tokenizer(tmp_path)
    one = ChatModel("tiny", config, params, tokenizer).answers(rows, decoding(NEW), 8)
    many = ChatModel("tiny", config, placed, tokenizer, mesh).answers(rows, decoding(NEW), 8)
    np.testing.assert_array_equal(many.tokens, one.tokens)
    batch = pad_rows(rows, count=8, shared=P)
    assert put_rows(batch, mesh).shared == P
    np.testing.assert_array_equal(
        generate(config, params, dataclasses.replace(batch, shared=0), decoding(NEW)).tokens[:7], one.tokens
    )


@given(st.integers(0, 40), st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(0, 3))
def test_what_rows_begin_with_is_found(shared, lengths, behind):
    """Against a loop over the tokens."""
    rows = [Row((5,) * shared + (i + 6,) * n, max(0, shared + n - 1 - behind)) for i, n in enumerate(lengths)]
    alike = 0
    while all(alike < row.instruction_end and row.ids[alike] == rows[0].ids[alike] for row in rows):
        alike += 1
    found = shared_tokens(rows)
    assert found == (alike - alike % 8 if alike >= 16 else 0)
    batch = pad_rows(rows, shared=found)
    assert (batch.instruction_end >= found).all() and batch.shared == found
    for tokens, valid in zip(batch.tokens, batch.valid, strict=True):
        assert tuple(tokens[valid][:found]) == rows[0].ids[:found]


def test_batches_know_what_their_rows_begin_with():
    seen = []

    def call(batch, indices):
        seen.append((batch.shared, batch.tokens.shape))
        return batch.valid.sum(-1)

    rows = rows_behind(SYSTEM, [9, 30, 4, 1, 17], [0] * 5)
    np.testing.assert_array_equal(in_order(run_batches(call, rows, 4)), [len(row.ids) for row in rows])
    assert seen == [(P, (4, P + 32)), (P, (1, P + 32))]
    seen.clear()
    list(run_batches(call, rows[:1], 4))
    list(run_batches(call, [*rows, *random_rows([20])], 8))
    assert {shared for shared, _ in seen} == {0}
