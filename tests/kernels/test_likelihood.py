"""The likelihood of continuations against a loop over their tokens in float64."""

import jax
import numpy as np
import pytest
from tiny import random_rows, tiny_config, tiny_params

from jaxsafe.kernels import likelihood as module
from jaxsafe.kernels.likelihood import likelihood
from jaxsafe.model.transformer import forward, unembed
from jaxsafe.parallel import parse_mesh, put_rows
from jaxsafe.rows import Row, pad_rows

LENGTHS, BEHIND = [9, 40, 2, 24, 17], [3, 33, 1, 23, 1]
whole = jax.jit(forward, static_argnames=("config", "last"))


def split(texts):
    """Rows without their last token, and those tokens."""
    rows = [Row(row.ids[:-1], row.instruction_end) for row in texts]
    return rows, np.array([row.ids[-1] for row in texts], np.int32)


def greedy_text(config, params, start, new):
    """`start` and the `new` most likely tokens behind it."""
    ids = list(start)
    for _ in range(new):
        batch = pad_rows([Row(tuple(ids), len(ids) - 1)])
        ids.append(int(whole(config, params, batch.tokens, batch.valid)[0, -1].argmax()))
    return Row(tuple(ids), len(start) - 1)


def slow(config, params, texts):
    """Log-likelihood of each continuation by a loop in float64, and whether each token is the most likely one."""
    totals, greedy = [], []
    for text in texts:
        ids = np.array([text.ids], np.int32)
        logits = np.asarray(whole(config, params, ids, np.ones_like(ids, bool)), np.float64)[0]
        total, every = 0.0, True
        for i in range(text.instruction_end + 1, len(text.ids)):
            line = logits[i - 1]
            total += line[text.ids[i]] - line.max() - np.log(np.exp(line - line.max()).sum())
            every &= int(line.argmax()) == text.ids[i]
        totals.append(total)
        greedy.append(every)
    return np.array(totals), np.array(greedy)


def cases(config, params):
    """Random texts, a greedy one, and the greedy one with its first or its last token exchanged."""
    texts = random_rows(LENGTHS, behind=BEHIND)
    chosen = greedy_text(config, params, texts[0].ids[:5], 19)
    end = chosen.instruction_end
    first, last = list(chosen.ids), list(chosen.ids)
    first[end + 1] = first[end + 1] % 299 + 1
    last[-1] = last[-1] % 299 + 1
    return [*texts, chosen, Row(tuple(first), end), Row(tuple(last), end)]


@pytest.mark.parametrize("block", [4, 16, 64])
@pytest.mark.parametrize("changes", [{}, {"window": 7, "family": "mistral", "tied": True}], ids=["llama", "mistral"])
def test_a_loop_over_tokens_gives_the_same(changes, block):
    config = tiny_config(layers=2, **changes)
    params = tiny_params(config)
    texts = cases(config, params)
    rows, final = split(texts)
    total, greedy = likelihood(config, params, pad_rows(rows), final, block)
    wanted, wanted_greedy = slow(config, params, texts)
    np.testing.assert_allclose(total, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(greedy, wanted_greedy)
    assert wanted_greedy.tolist() == [False] * 5 + [True, False, False]
    assert total.dtype == np.float32 and greedy.dtype == bool


def test_padding_changes_nothing():
    config = tiny_config(layers=2)
    params = tiny_params(config)
    texts = cases(config, params)
    rows, final = split(texts)
    total, greedy = likelihood(config, params, pad_rows(rows), final)
    n = len(rows)
    for length, count in [(48, n), (71, n + 3), (96, n + 1)]:
        padded = pad_rows(rows, length=length, count=count, pad=5)
        more, more_greedy = likelihood(config, params, padded, np.pad(final, (0, count - n), constant_values=7))
        np.testing.assert_allclose(more[:n], total, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(more_greedy[:n], greedy)
        np.testing.assert_array_equal(more[n:], 0)
    for i, row in enumerate(rows):
        alone, alone_greedy = likelihood(config, params, pad_rows([row]), final[i : i + 1])
        np.testing.assert_allclose(alone[0], total[i], rtol=1e-5, atol=1e-5)
        assert alone_greedy[0] == greedy[i]


def test_rows_spread_over_devices_give_the_same():
    config = tiny_config(layers=2)
    params = tiny_params(config)
    rows, final = split(cases(config, params))
    batch = pad_rows(rows)
    spread = put_rows((batch, final), parse_mesh("data:-1"))
    for ours, wanted in zip(likelihood(config, params, *spread), likelihood(config, params, batch, final), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


def test_one_program_for_other_parameters_and_other_continuations():
    config = tiny_config(layers=2)
    likelihood.clear_cache()
    totals = []
    for seed in range(3):
        rows, final = split(random_rows(LENGTHS, behind=BEHIND if seed < 2 else [1] * 5, seed=0))
        totals.append(np.asarray(likelihood(config, tiny_params(config, seed), pad_rows(rows), final)[0]))
    assert likelihood._cache_size() == 1
    assert (np.abs(totals[0] - totals[1]) > 0.01).all()


def test_logits_exist_for_the_blocks_of_continuations_only(monkeypatch):
    config = tiny_config(layers=1, context=512)
    shapes, runs = [], []

    def recorded(config, x, head):
        shapes.append(x.shape)
        jax.debug.callback(lambda: runs.append(1))
        return unembed(config, x, head)

    monkeypatch.setattr(module, "unembed", recorded)
    rows, final = split(random_rows([300, 40], behind=[20, 2]))
    batch = pad_rows(rows)
    assert batch.tokens.shape == (2, 384)
    jax.block_until_ready(likelihood.__wrapped__(config, tiny_params(config), batch, final, 16))
    jax.effects_barrier()
    assert shapes == [(2, 16, config.embed)]
    assert len(runs) == 2
