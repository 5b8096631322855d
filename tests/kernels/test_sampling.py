"""Drawing tokens, against slow NumPy, the processors of transformers, and the probabilities themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxsafe.kernels.sampling import (
    Sampling,
    check_sampling,
    keep_likely,
    most_likely,
    next_token,
    penalise,
    row_seeds,
    sampling_keys,
)
from jaxsafe.rows import Row

V = 24
draw = jax.jit(next_token)
unhurried = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**31)


def logits_of(seed, rows=4):
    return (3 * np.random.default_rng(seed).standard_normal((rows, V))).astype(np.float32)


def slow_penalty(logits, rows, penalty):
    out = logits.astype(np.float64)
    for b, row in enumerate(rows):
        for token in set(row):
            out[b, token] = out[b, token] / penalty if out[b, token] > 0 else out[b, token] * penalty
    return out


@unhurried
@given(seeds, st.sampled_from([0.5, 1.0, 1.1, 2.0]))
def test_the_repetition_penalty_is_that_of_a_loop_over_the_tokens(seed, penalty):
    logits = logits_of(seed)
    rows = np.random.default_rng(seed + 1).integers(0, V, (4, 6))
    seen = np.zeros((4, V), bool)
    seen[np.arange(4)[:, None], rows] = True
    out = penalise(jnp.asarray(logits), jnp.asarray(seen), jnp.float32(penalty))
    np.testing.assert_allclose(out, slow_penalty(logits, rows, penalty), rtol=1e-6)


def test_every_row_may_have_its_own_penalty():
    logits, seen = logits_of(0), np.ones((4, V), bool)
    each = np.array([1.0, 1.1, 2.0, 0.5], np.float32)
    out = penalise(jnp.asarray(logits), jnp.asarray(seen), jnp.asarray(each))
    for b in range(4):
        np.testing.assert_allclose(out[b], slow_penalty(logits[b : b + 1], [range(V)], each[b])[0], rtol=1e-6)


def slow_kept(logits, k, p):
    """The tokens kept of one row: the k best, and of those the fewest whose probabilities reach p."""
    best = sorted(range(V), key=lambda i: (-logits[i], i))[: k or V]
    weights = np.exp(logits[best].astype(np.float64) - logits[best[0]])
    kept, total = [], 0.0
    for token, share in zip(best, weights / weights.sum(), strict=True):
        if kept and total >= p:
            break
        kept.append(token)
        total += share
    return set(kept)


@unhurried
@given(
    seeds, st.lists(st.integers(0, V + 3), min_size=4, max_size=4), st.lists(st.floats(0.01, 1), min_size=4, max_size=4)
)
def test_top_k_and_top_p_keep_what_a_loop_keeps(seed, ks, ps):
    logits = logits_of(seed)
    out = np.asarray(keep_likely(jnp.asarray(logits), jnp.asarray(ks, jnp.int32), jnp.asarray(ps, jnp.float32)))
    for b in range(4):
        kept = set(np.flatnonzero(np.isfinite(out[b])).tolist())
        assert kept == slow_kept(logits[b], ks[b], np.float32(ps[b])), (ks[b], ps[b])
        np.testing.assert_array_equal(out[b, sorted(kept)], logits[b, sorted(kept)])


@given(st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0, np.inf]), min_size=1, max_size=9), st.integers(1, 3))
def test_the_most_likely_token_is_the_first_of_the_largest(line, rows):
    logits = np.array([np.roll(line, i) for i in range(rows)], np.float32)
    found = most_likely(jnp.asarray(logits))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, logits.argmax(-1))


def test_a_row_without_numbers_still_names_a_token():
    assert most_likely(jnp.array([[np.nan, np.nan, np.nan], [0.0, 1.0, 0.0]])).tolist() == [2, 1]


def test_of_equal_logits_the_first_are_kept():
    out = keep_likely(jnp.zeros((1, V)), jnp.array([3]), jnp.array([1.0]))
    np.testing.assert_array_equal(np.isfinite(out[0]), np.arange(V) < 3)


def test_the_processors_of_transformers_agree():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    rows = np.random.default_rng(3).integers(0, V, (4, 9))
    seen = np.zeros((4, V), bool)
    seen[np.arange(4)[:, None], rows] = True
    for seed, (penalty, k, p) in enumerate([(1.3, 5, 1.0), (1.1, V, 0.7), (0.8, 9, 0.4), (2.0, 1, 0.9)]):
        logits = logits_of(seed)
        theirs = torch.tensor(logits)
        for processor in (
            logits_process.RepetitionPenaltyLogitsProcessor(penalty),
            logits_process.TemperatureLogitsWarper(0.7),
            logits_process.TopKLogitsWarper(k),
            logits_process.TopPLogitsWarper(p),
        ):
            theirs = processor(torch.tensor(rows), theirs)
        ours = penalise(jnp.asarray(logits), jnp.asarray(seen), jnp.float32(penalty)) / 0.7
        ours = keep_likely(ours, jnp.full(4, k), jnp.full(4, p, jnp.float32))
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def drawn(logits, n, step=0, seed=0, **sampling):
    """`n` draws from one row of logits, each with a key of its own."""
    many = jnp.broadcast_to(jnp.asarray(logits), (n, V))
    return np.asarray(draw(many, Sampling(**sampling), sampling_keys(seed, np.arange(n)), jnp.int32(step)))


def probabilities(logits, temperature, kept=None):
    w = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    w = w if kept is None else np.where(np.isin(np.arange(V), list(kept)), w, 0)
    return w / w.sum()


def chi_square(tokens, p):
    """The p-value of the drawn tokens under probabilities `p`, rare tokens in one bin."""
    counts, expected = np.bincount(tokens, minlength=V), len(tokens) * p
    rare = expected < 10
    bins = [(counts[i], expected[i]) for i in np.flatnonzero(~rare)]
    if expected[rare].sum() > 5:
        bins.append((counts[rare].sum(), expected[rare].sum()))
    observed, wanted = np.array(bins).T
    return stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


@pytest.mark.parametrize(
    ("temperature", "k", "p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 6, 1.0), (1.0, 0, 0.8), (1.3, 9, 0.7)]
)
def test_tokens_are_drawn_with_their_probabilities(temperature, k, p):
    logits = logits_of(5, 1)[0] / 2
    tokens = drawn(logits, 20_000, temperature=temperature, top_k=k, top_p=p)
    kept = slow_kept(logits / np.float32(temperature), k, p)
    assert set(tokens.tolist()) <= kept
    assert chi_square(tokens, probabilities(logits, temperature, kept)) > 0.01
    # The test has the power to see a temperature that is off by a fifth.
    assert chi_square(tokens, probabilities(logits, 1.2 * temperature, kept)) < 1e-3


def test_steps_and_seeds_draw_independently():
    logits = np.zeros(V, np.float32)
    first = drawn(logits, 20_000, temperature=1.0)
    np.testing.assert_array_equal(first, drawn(logits, 20_000, temperature=1.0))
    for other in (drawn(logits, 20_000, step=1, temperature=1.0), drawn(logits, 20_000, seed=1, temperature=1.0)):
        table = np.zeros((V, V))
        np.add.at(table, (first, other), 1)
        assert stats.chi2_contingency(table).pvalue > 0.01


def test_temperature_zero_is_greedy_row_by_row():
    logits = jnp.asarray(logits_of(1))
    best = np.asarray(logits).argmax(-1)
    keys = sampling_keys(0, np.arange(4))
    np.testing.assert_array_equal(draw(logits, Sampling(), keys, jnp.int32(0)), best)
    mixed = Sampling(temperature=jnp.array([0.0, 50.0, 0.0, 50.0]))
    tokens = np.stack([draw(logits, mixed, keys, jnp.int32(step)) for step in range(20)])
    assert (tokens[:, [0, 2]] == best[[0, 2]]).all()
    assert all(len(set(tokens[:, b].tolist())) > 5 for b in (1, 3))


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_from_one_token_is_greedy(narrow):
    logits = logits_of(2)
    tokens = draw(jnp.asarray(logits), Sampling(temperature=2.0, **narrow), sampling_keys(0, np.arange(4)), 0)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_rows_have_their_own_limits():
    logits = jnp.broadcast_to(jnp.asarray(logits_of(2, 1)), (4, V))
    ranks = np.argsort(np.argsort(-np.asarray(logits[0])))
    sampling = Sampling(temperature=jnp.full(4, 9.0), top_k=jnp.array([1, 2, 4, 0]))
    keys = sampling_keys(0, np.arange(4))
    tokens = np.stack([draw(logits, sampling, keys, jnp.int32(step)) for step in range(60)])
    assert [ranks[tokens[:, b]].max() for b in range(3)] == [0, 1, 3] and ranks[tokens[:, 3]].max() > 3


def test_the_number_of_a_row_is_its_own_wherever_it_stands():
    rows = [Row(tuple(ids), 0) for ids in ([5], [6], [5, 6], [6, 5], [5])]
    numbers = row_seeds(rows)
    assert numbers.dtype == np.uint32 and len(set(numbers.tolist())) == 5
    assert row_seeds(rows[::-1]).tolist() == [*numbers[[0, 3, 2, 1]], numbers[4]]
    assert row_seeds(rows[2:3]).tolist() == [numbers[2]]
    keys = jax.random.key_data(sampling_keys(0, numbers))
    assert len({tuple(k) for k in keys.tolist()}) == 5


def test_numbers_out_of_range_are_refused():
    check_sampling(Sampling())
    check_sampling(Sampling(temperature=np.array([0.0, 1.0]), top_k=np.array([0, 5]), top_p=np.array([1.0, 0.1])))
    for bad, message in [
        ({"temperature": -0.1}, "temperature -0.1 is negative"),
        ({"temperature": np.array([1.0, -1.0])}, "temperature .* is negative"),
        ({"top_k": -1}, "top_k -1 is negative"),
        ({"top_p": 0.0}, r"top_p 0.0 is not in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p 1.5 is not in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 is not positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_sampling(Sampling(**bad))
