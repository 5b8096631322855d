"""SCANS in one program against its two passes: classify by a plain pass, then generate with an edit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import decoding, random_rows, tiny_config, tiny_params

from jaxsafe.kernels.forward import capture
from jaxsafe.kernels.generate import generate
from jaxsafe.kernels.sampling import drawing, row_seeds
from jaxsafe.kernels.steering import (
    Steering,
    anchor_states,
    answer_divergence,
    decide,
    layer_cosines,
    mean_cosine,
    prefill_and_read,
    rerun,
    start_positions,
    steered_answers,
    steered_nll,
    unit,
)
from jaxsafe.model.taps import edit
from jaxsafe.model.transformer import Transformer, forward, variables
from jaxsafe.rows import Row, pad_rows

NEW = 10
EOS = (257, 125, 140)
LENGTHS = [5, 16, 9, 12, 14, 7]
read = jax.jit(capture, static_argnames=("config", "taps"))
whole = jax.jit(forward, static_argnames=("config", "last"))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and rows; `behind` counts the tokens of a begun answer behind each instruction end."""

    changes: tuple[tuple[str, object], ...] = ()
    behind: tuple[int, ...] = (0,) * 6
    affirmative: tuple[int, ...] = (57,)

    @property
    def config(self):
        return tiny_config(**dict(self.changes))

    @property
    def rows(self):
        return random_rows(LENGTHS, behind=list(self.behind))


BEGUN = (2, 0, 3, 5, 1, 0)
WINDOW = (("window", 5), ("family", "mistral"))
CASES = {
    "chat": Case(),
    "begun": Case(behind=BEGUN, affirmative=(57, 91, 269)),
    "window": Case(WINDOW, BEGUN, (57, 91, 269)),
}


BEGUN_CASES = pytest.mark.parametrize("case", [CASES["begun"], CASES["window"]], ids=["begun", "window"])
ALL_CASES = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@functools.cache
def states(case):
    """Residual stream at the instruction end and its change, [B, L, D] each, by one pass over prompt + affirmative."""
    texts = [Row(row.ids[: row.instruction_end + 1] + case.affirmative, row.instruction_end) for row in case.rows]
    batch = pad_rows(texts)
    resid = np.asarray(read(case.config, tiny_params(case.config), batch.tokens, batch.valid)["resid"])
    at_end = np.stack([resid[:, b, end] for b, end in enumerate(batch.instruction_end)])
    return at_end, at_end - resid[:, :, -1].swapaxes(0, 1)


def slow_cosines(change, reference):
    out = np.zeros(change.shape[:2])
    for b in range(len(change)):
        for layer in range(change.shape[1]):
            x, y = change[b, layer].astype(np.float64), reference[layer].astype(np.float64)
            lengths = np.sqrt((x * x).sum()) * np.sqrt((y * y).sum())
            out[b, layer] = (x * y).sum() / lengths if lengths else 0.0
    return out


def steering_for(case, seed=0):
    """Random directions, steered in the last two layers; the threshold lies between the scores of the rows."""
    rng = np.random.default_rng(seed)
    directions, reference = rng.standard_normal((2, case.config.layers, case.config.embed)).astype(np.float32)
    scored = np.array([0, 1, 1], np.float32)
    scores = np.sort(slow_scores(case, reference, scored))
    return Steering(
        directions=unit(jnp.asarray(directions)),
        reference=jnp.asarray(reference),
        scored=jnp.asarray(scored),
        threshold=jnp.float32(scores[2] / 2 + scores[3] / 2),
        strength=jnp.array([0.0, 3.0, 4.0]),
        affirmative=jnp.array(case.affirmative),
    )


def slow_scores(case, reference, scored):
    cosines = slow_cosines(states(case)[1], np.asarray(reference))
    return cosines[:, np.asarray(scored) > 0].mean(axis=1)


def slow_gates(case, steering):
    scores = slow_scores(case, steering.reference, steering.scored)
    return np.where(scores >= float(steering.threshold), 1.0, -1.0)


def again_of(batch):
    return int(batch.tokens.shape[1] - batch.instruction_end.min())


def draws(rows, new=NEW, **options):
    """How the programs draw the tokens of `rows`."""
    return drawing(decoding(new, eos=EOS, **options), row_seeds(rows))


def answered(case, steering, rows=None, batch=None, draw=None, **options):
    """Answers and scores of `rows` from one prefill."""
    rows = case.rows if rows is None else rows
    start, prefilled, again = prefilled_of(case, steering, pad_rows(rows) if batch is None else batch)
    decision = decide(steering, prefilled.states, start[-1], jnp.float32(1))
    draw = draws(rows, **options) if draw is None else draw
    return steered_answers(*start, prefilled.cache, decision.edits, draw, again), decision.score


def prefilled_of(case, steering, batch=None):
    batch = pad_rows(case.rows) if batch is None else batch
    start = (case.config, tiny_params(case.config), batch)
    return start, prefill_and_read(*start, steering.affirmative, NEW), again_of(batch)


def edits_of(steering, prefilled, batch, share=1.0):
    return decide(steering, prefilled.states, batch, jnp.float32(share)).edits


def test_cosines_and_scores_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    change = rng.standard_normal((5, 3, 32)).astype(np.float32)
    reference = rng.standard_normal((3, 32)).astype(np.float32)
    change[2, 1], reference[2] = 0, 0
    cosines = np.asarray(layer_cosines(jnp.asarray(change.swapaxes(0, 1)), jnp.asarray(reference)))
    np.testing.assert_allclose(cosines, slow_cosines(change, reference), atol=1e-6)
    assert cosines[2, 1] == 0 and (cosines[:, 2] == 0).all() and np.abs(cosines[:, 0]).min() > 0
    for scored in ([1, 1, 1], [0, 1, 0], [1, 1, 0]):
        wanted = cosines[:, np.array(scored) > 0].mean(axis=1)
        np.testing.assert_allclose(mean_cosine(jnp.asarray(cosines), jnp.array(scored, jnp.float32)), wanted, atol=1e-6)


def test_a_score_at_the_threshold_is_harmful():
    scores = mean_cosine(jnp.array([[0.25], [0.5], [0.75]]), jnp.ones(1))
    steering = Steering(None, None, jnp.ones(1), jnp.float32(0.5), None, None)
    np.testing.assert_array_equal(steering.sign(scores), [-1, 1, 1])


def test_states_at_the_instruction_end_are_those_of_a_plain_pass():
    case = CASES["window"]
    batch, (at_end, change) = pad_rows(case.rows), states(case)
    given = (case.config, tiny_params(case.config), batch, jnp.array(case.affirmative))
    ours = anchor_states(*given)
    np.testing.assert_allclose(ours[0], at_end, atol=2e-5)
    np.testing.assert_allclose(ours[1], change, atol=2e-5)


@ALL_CASES
def test_one_prefill_is_two_passes(case):
    steering = steering_for(case)
    gate = slow_gates(case, steering)
    assert sorted(gate) == [-1, -1, -1, 1, 1, 1]
    answers, scores = answered(case, steering)
    np.testing.assert_allclose(scores, slow_scores(case, steering.reference, steering.scored), atol=1e-5)

    add = steering.strength[:, None] * steering.directions
    start = jnp.array([row.instruction_end for row in case.rows])
    edits = {"resid": edit(add=add, gate=jnp.asarray(gate), start=start)}
    config, params, batch = case.config, tiny_params(case.config), pad_rows(case.rows)
    wanted = generate(config, params, batch, decoding(NEW, eos=EOS), edits)
    np.testing.assert_array_equal(answers.tokens, wanted.tokens)
    np.testing.assert_array_equal(answers.lengths, wanted.lengths)
    # Were every row steered the same way, or the whole prompt, the answers would be others.
    for gate_, start_ in ((jnp.ones(6), start), (-jnp.ones(6), start), (jnp.asarray(gate), 0 * start)):
        others = {"resid": edit(add=add, gate=gate_, start=start_)}
        other = generate(config, params, batch, decoding(NEW, eos=EOS), others)
        assert (other.tokens != wanted.tokens).any()


def test_one_prefill_samples_as_two_passes_do():
    case = CASES["begun"]
    steering = steering_for(case)
    start = jnp.array([row.instruction_end for row in case.rows])
    add = steering.strength[:, None] * steering.directions
    edits = {"resid": edit(add=add, gate=jnp.asarray(slow_gates(case, steering)), start=start)}
    options = {"temperature": 1.3, "top_k": 30, "repetition_penalty": 1.2}
    answers, _ = answered(case, steering, seed=4, **options)
    params = tiny_params(case.config)
    wanted = generate(case.config, params, pad_rows(case.rows), decoding(NEW, eos=EOS, seed=4, **options), edits)
    np.testing.assert_array_equal(answers.tokens, wanted.tokens)


def test_fewer_new_tokens_than_the_affirmative_has():
    case = CASES["window"]
    steering = steering_for(case)
    short, _ = answered(case, steering, new=2)
    np.testing.assert_array_equal(short.tokens, answered(case, steering)[0].tokens[:, :2])


def test_nothing_before_the_instruction_end_is_touched():
    case = CASES["begun"]
    steering, gate = steering_for(case), slow_gates(case, steering_for(case))
    batch, params = pad_rows(case.rows), tiny_params(case.config)
    np.testing.assert_array_equal(start_positions(batch), [row.instruction_end for row in case.rows])

    def resid(gate):
        edits = steering.edits(jnp.asarray(gate), start_positions(batch))
        return np.asarray(read(case.config, params, batch.tokens, batch.valid, edits=edits)["resid"])

    steered, plain = resid(gate), resid(np.zeros(6))
    np.testing.assert_array_equal(plain, read(case.config, params, batch.tokens, batch.valid)["resid"])
    for b, (row, end) in enumerate(zip(case.rows, batch.instruction_end, strict=True)):
        first = batch.tokens.shape[1] - len(row.ids)
        np.testing.assert_array_equal(steered[:, b, first:end], plain[:, b, first:end])
        np.testing.assert_array_equal(steered[0, b, first:], plain[0, b, first:])
        # The first steered layer differs by the row's own sign times the vector, from the end on.
        moved = steered[1, b, end:] - plain[1, b, end:]
        vector = gate[b] * np.asarray(steering.strength[1] * steering.directions[1])
        np.testing.assert_allclose(moved, np.broadcast_to(vector, moved.shape), atol=1e-5)


def test_the_cache_before_the_instruction_end_is_that_of_the_prompt():
    case = CASES["begun"]
    steering = steering_for(case)
    (config, params, batch), prefilled, again = prefilled_of(case, steering)
    edits = steering.edits(jnp.asarray(slow_gates(case, steering)), start_positions(batch))
    given = rerun(batch, prefilled.cache, batch.tokens[:, :0], again)
    _, cache = jax.jit(Transformer(config).apply)(variables(params, edits), *given)
    T = batch.tokens.shape[1]
    for name in ("k", "v"):
        now, before = np.asarray(getattr(cache, name)), np.asarray(getattr(prefilled.cache, name))
        np.testing.assert_array_equal(now[:, :, :, : T - again], before[:, :, :, : T - again])
        for b, (row, end) in enumerate(zip(case.rows, batch.instruction_end, strict=True)):
            first = T - len(row.ids)
            np.testing.assert_allclose(now[:, b, :, first:end], before[:, b, :, first:end], atol=1e-5)
            # The layers after the first steered one see the edit at the end itself.
            np.testing.assert_allclose(now[:2, b, :, end], before[:2, b, :, end], atol=1e-5)
            assert np.abs(now[2, b, :, end] - before[2, b, :, end]).max() > 0.01


def test_no_strength_is_the_model_itself():
    case = CASES["window"]
    steering = steering_for(case)
    start, prefilled, again = prefilled_of(case, steering)
    off = edits_of(steering.replace(strength=jnp.zeros(3)), prefilled, start[-1])
    answers = steered_answers(*start, prefilled.cache, off, draws(case.rows), again)
    plain = generate(*start, decoding(NEW, eos=EOS))
    np.testing.assert_array_equal(answers.tokens, plain.tokens)
    np.testing.assert_array_equal(answers.lengths, plain.lengths)
    on = edits_of(steering, prefilled, start[-1])
    steered = steered_answers(*start, prefilled.cache, on, draws(case.rows), again)
    assert (steered.tokens != plain.tokens).any(axis=1).sum() >= 5
    # The same prefill serves again: nothing was written into it. No share of the gates is no strength.
    for nothing in (off, edits_of(steering, prefilled, start[-1], share=0.0)):
        again_off = steered_answers(*start, prefilled.cache, nothing, draws(case.rows), again)
        np.testing.assert_array_equal(again_off.tokens, answers.tokens)


def test_rows_in_another_order_answer_alike():
    case = CASES["begun"]
    steering, order = steering_for(case), [3, 0, 5, 1, 4, 2]
    answers, scores = answered(case, steering)
    shuffled, theirs = answered(case, steering, [case.rows[i] for i in order])
    np.testing.assert_array_equal(shuffled.tokens, np.asarray(answers.tokens)[order])
    np.testing.assert_allclose(theirs, np.asarray(scores)[order], atol=1e-6)


def test_padding_rows_answer_nothing_and_disturb_nobody():
    case = CASES["begun"]
    steering, rows = steering_for(case), case.rows[:4]
    batch = pad_rows(rows, length=16, count=6)
    draw = drawing(decoding(NEW, eos=EOS), np.concatenate([row_seeds(rows), [0, 0]]))
    answers, scores = answered(case, steering, batch=batch, draw=draw)
    wanted, wanted_scores = answered(case, steering)
    np.testing.assert_array_equal(answers.tokens[:4], wanted.tokens[:4])
    np.testing.assert_array_equal(answers.tokens[4:], 0)
    np.testing.assert_array_equal(answers.lengths, [*wanted.lengths[:4], 0, 0])
    np.testing.assert_allclose(scores[:4], wanted_scores[:4], atol=1e-6)
    assert np.isfinite(scores).all()


def test_no_threshold_strength_or_layer_range_recompiles():
    case = CASES["begun"]
    steering = steering_for(case)
    changes = [
        {},
        {"threshold": jnp.float32(-1)},
        {"threshold": jnp.float32(2), "scored": jnp.array([1.0, 0, 0])},
        {"strength": jnp.array([0.0, 0.5, 0])},
        {"strength": jnp.array([9.0, 0, 9]), "directions": -steering.directions, "reference": 2 * steering.reference},
    ]
    sizes, answers = [], []
    for change in changes:
        changed = steering.replace(**change)
        answers.append(np.asarray(answered(case, changed)[0].tokens).tolist())
        answered(case, changed, temperature=0.1 * len(sizes), seed=len(sizes))
        sizes.append([program._cache_size() for program in (prefill_and_read, decide, steered_answers)])
    assert all(size == sizes[0] for size in sizes)
    assert all(one != answers[0] for one in answers[1:])


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@BEGUN_CASES
def test_the_divergence_is_that_of_two_plain_passes(case):
    steering = steering_for(case)
    start, prefilled, again = prefilled_of(case, steering)
    config, params, _ = start
    pair = edits_of(steering, prefilled, start[-1], share=0.0), edits_of(steering, prefilled, start[-1])
    answers = steered_answers(*start, prefilled.cache, pair[0], draws(case.rows), again)
    assert len(set(np.asarray(answers.lengths).tolist())) > 1
    kl, counts = answer_divergence(*start, prefilled.cache, pair, answers, again)
    np.testing.assert_array_equal(counts, answers.lengths)

    texts = [
        Row(r.ids + tuple(np.asarray(t).tolist()), r.instruction_end)
        for r, t in zip(case.rows, answers.tokens, strict=True)
    ]
    batch = pad_rows(texts)
    before, after = (
        log_softmax(whole(config, params, batch.tokens, batch.valid, steering.edits(gate, start_positions(batch))))
        for gate in (jnp.zeros(6), jnp.asarray(slow_gates(case, steering), jnp.float32))
    )
    for b in range(6):
        total = 0.0
        for i in range(int(answers.lengths[b])):
            at = batch.tokens.shape[1] - NEW + i - 1
            total += (np.exp(before[b, at]) * (before[b, at] - after[b, at])).sum()
        np.testing.assert_allclose(kl[b], total, rtol=1e-4, atol=1e-5)
    assert np.asarray(kl).max() > 1


def test_no_strength_diverges_by_nothing():
    case = CASES["begun"]
    steering = steering_for(case)
    start, prefilled, again = prefilled_of(case, steering)
    off = edits_of(steering.replace(strength=jnp.zeros(3)), prefilled, start[-1])
    pair = edits_of(steering, prefilled, start[-1], share=0.0), off
    answers = steered_answers(*start, prefilled.cache, off, draws(case.rows), again)
    np.testing.assert_array_equal(answer_divergence(*start, prefilled.cache, pair, answers, again)[0], 0)


@BEGUN_CASES
def test_the_likelihood_of_answers_is_that_of_one_steered_pass_a_row(case):
    steering = steering_for(case)
    start, prefilled, again = prefilled_of(case, steering)
    config, params, _ = start
    nll, counts = steered_nll(*start, prefilled.cache, edits_of(steering, prefilled, start[-1]), again, block=2)
    plain, _ = steered_nll(*start, prefilled.cache, edits_of(steering, prefilled, start[-1], share=0.0), again)
    for b, (row, gate) in enumerate(zip(case.rows, slow_gates(case, steering), strict=True)):
        alone = pad_rows([row])
        edits = steering.edits(jnp.array([gate], jnp.float32), start_positions(alone))
        answer = range(row.instruction_end + 1, len(row.ids))
        assert counts[b] == len(answer)
        for found, edit_ in ((nll, edits), (plain, None)):
            logits = log_softmax(whole(config, params, alone.tokens, alone.valid, edit_)[0])
            wanted = -sum(logits[len(logits) - len(row.ids) + i - 1, row.ids[i]] for i in answer)
            np.testing.assert_allclose(found[b], wanted, rtol=1e-4, atol=1e-5)
    assert not np.allclose(nll, plain)
