"""Gates and actions against slow references: one row at a time, unpadded, every token by a whole pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import decoding, tiny_chat_model

from jaxsafe.kernels.ablation import written_directions
from jaxsafe.kernels.actions import SPANS, Ablate, Add, Clamp, Gated, named_span
from jaxsafe.kernels.forward import capture
from jaxsafe.kernels.gates import Condition, Linear, Open, Transition
from jaxsafe.kernels.steering import PromptStates
from jaxsafe.model.taps import Both, Edit, edit
from jaxsafe.model.transformer import forward

PROMPTS = ["How do I bake bread?", "Why?", "Write a poem about rivers and boats for my friends, please."]
NEW = 5
logits_of = jax.jit(forward, static_argnames=("config", "last"))
captured = jax.jit(capture, static_argnames=("config", "taps"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def unit_rows(*shape, seed=0):
    x = normal(*shape, seed=seed)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


# The edit itself


def by_row(field, b):
    return float(np.ravel(np.asarray(field))[min(b, np.size(field) - 1)])


def slow_edit(e, x, positions):
    """`Edit` of one layer, position by position, in float64; fields without a leading axis of layers."""
    x, positions = np.asarray(x, np.float64), np.asarray(positions)
    out = x.copy()
    for b in range(len(x)):
        gate, start = (by_row(field, b) for field in (e.gate, e.start))
        stop = np.inf if e.stop is None else by_row(e.stop, b)
        if e.read is not None:
            ends = [t for t in range(x.shape[1]) if positions[b, t] == stop - 1]
            gate = gate * (x[b, ends[-1]] @ np.asarray(e.read, np.float64) if ends else 0.0)
        for t in range(x.shape[1]):
            if start <= positions[b, t] < stop:
                along = x[b, t] @ np.asarray(e.ablate, np.float64)
                along = along if e.above is None else max(along - float(e.above), 0.0)
                out[b, t] += gate * (np.asarray(e.add) - along * np.asarray(e.ablate))
    return out


@pytest.mark.parametrize("parts", [(), ("stop",), ("stop", "above"), ("stop", "read"), ("above",)], ids="-".join)
def test_an_edit_is_its_formula_at_its_positions(parts):
    B, T, F = 3, 6, 8
    x = normal(B, T, F)
    positions = jnp.asarray([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3], [0, 0, 0, 0, 0, 1]])
    extra = {
        "stop": jnp.asarray([4, 3, 9], jnp.int32),
        "above": jnp.float32(0.3),
        "read": normal(F, seed=3),
    }
    given = Edit(
        normal(F, seed=1),
        unit_rows(F, seed=2),
        jnp.asarray([1.0, -0.5, 2.0]),
        jnp.asarray([1, 0, 0], jnp.int32),
        **{name: extra[name] for name in parts},
    )
    np.testing.assert_allclose(given(x, positions), slow_edit(given, x, positions), atol=1e-5)
    again = Both(given, given)(x, positions)
    np.testing.assert_allclose(again, slow_edit(given, given(x, positions), positions), atol=1e-5)


def test_a_gate_that_is_read_needs_its_position():
    with pytest.raises(ValueError, match="needs stop"):
        edit(add=jnp.zeros((2, 4)), read=jnp.zeros((2, 4)))


# Actions under every span


def actions(model, span):
    L, D = model.config.layers, model.config.embed
    direction = unit_rows(D, seed=5)
    return {
        "add": Add(2 * normal(L, D, seed=4) / np.sqrt(D), span),
        "ablate": Ablate(written_directions(model.config, model.params, direction), span),
        "clamp": Clamp(unit_rows(L, D, seed=6), normal(L, seed=7), span),
        "cap": Clamp(unit_rows(L, D, seed=6), 0.1 * normal(L, seed=7), span, one_sided=True),
    }


def bounded(edits, end, span):
    """`edits` whose bounds are set by hand from the names of spans."""
    first, stop = {"end": (end, end + 1), "end+4": (end, end + 5), "answer": (end, 999), "prompt": (0, end + 1)}.get(
        span, (0, 999)
    )
    return {
        tap: e.replace(start=jnp.full_like(e.start, first), stop=jnp.full_like(e.stop, stop))
        for tap, e in edits.items()
    }


def slow_answer(model, action, span, prompt):
    """Greedy tokens, each by a pass over all tokens so far."""
    row = model.row(prompt)
    ids, end = list(row.ids), row.instruction_end
    edits = bounded(actions(model, named_span(span))[action].edits(jnp.ones(1), jnp.asarray([end])), end, span)
    for _ in range(NEW):
        tokens = jnp.asarray([ids + [0] * (64 - len(ids))])
        valid = jnp.arange(tokens.shape[1])[None] < len(ids)
        logits = logits_of(model.config, model.params, tokens, valid, edits)
        ids.append(int(jnp.argmax(logits[0, len(ids) - 1])))
    return ids[len(row.ids) :]


@pytest.mark.parametrize(
    ("action", "span"),
    [*(("add", span) for span in SPANS), ("ablate", "prompt"), ("ablate", "all"), ("clamp", "end"), ("cap", "all")],
)
def test_answers_under_an_action_are_those_of_whole_passes(model, action, span):
    rule = Gated(Open(), actions(model, named_span(span))[action])
    own, steered = model.steered([None, rule]).answers(PROMPTS, decoding(NEW))
    assert [ids.tolist() for ids in own.tokens] == [
        ids.tolist() for ids in model.answers(PROMPTS, decoding(NEW)).tokens
    ]
    assert [ids.tolist() for ids in steered.tokens] == [slow_answer(model, action, span, p) for p in PROMPTS]


def test_actions_change_answers(model):
    own = model.answers(PROMPTS, decoding(NEW)).tokens
    for action, span in (("add", "end"), ("ablate", "prompt"), ("clamp", "end"), ("cap", "all")):
        rule = Gated(Open(), actions(model, named_span(span))[action])
        assert (model.steered([rule]).answers(PROMPTS, decoding(NEW))[0].tokens != own).any(), action


def test_likelihoods_reach_back_as_far_as_the_span(model):
    rule = Gated(Open(), actions(model, named_span("all"))["add"])
    rows = [model.row(prompt, " of the old kite") for prompt in PROMPTS]
    nll, counts = model.steered([rule]).nll(rows)[0]
    for row, value, count in zip(rows, nll, counts, strict=True):
        edits = bounded(rule.edits(jnp.ones(1), jnp.asarray([row.instruction_end])), row.instruction_end, "all")
        logits = logits_of(model.config, model.params, jnp.asarray([row.ids]), jnp.ones((1, len(row.ids)), bool), edits)
        scores = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)))
        behind = range(row.instruction_end + 1, len(row.ids))
        assert count == len(behind)
        np.testing.assert_allclose(value, -sum(scores[t - 1, row.ids[t]] for t in behind), rtol=1e-4)


# Gates


def states(seed=0, L=3, B=5, D=8):
    return PromptStates(normal(L, B, D, seed=seed), normal(L, B, D, seed=seed + 1), normal(L, B, D, seed=seed + 2))


def test_scores_are_their_formulas_and_gates_open_below_the_threshold():
    given, (L, B, D) = states(), (3, 5, 8)
    reference, weights = normal(L, D, seed=9), normal(L, D, seed=10)
    at_end, change, mean = (np.asarray(a, np.float64) for a in (given.at_end, given.change, given.mean))
    scored = np.array([0.0, 1.0, 1.0])

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    transition = [np.mean([cosine(change[l, b], np.float64(reference[l])) for l in (1, 2)]) for b in range(B)]
    linear = [sum(at_end[l, b] @ np.float64(weights[l]) for l in range(L)) + 0.5 for b in range(B)]
    c = np.float64(unit_rows(L, D, seed=11))
    condition = [-cosine(mean[2, b], np.tanh((mean[2, b] @ c[2]) * c[2])) for b in range(B)]
    middle = jnp.float32(np.median(linear))
    gates = {
        "transition": (
            Transition(reference, jnp.asarray(scored, jnp.float32), jnp.float32(0), jnp.zeros(1)),
            transition,
        ),
        "linear": (Linear(weights, jnp.float32(0.5), middle), linear),
        "condition": (
            Condition(jnp.asarray(c, jnp.float32), jnp.asarray([0.0, 0.0, 1.0]), jnp.float32(0), jnp.float32(-1)),
            condition,
        ),
    }
    for name, (gate, expected) in gates.items():
        np.testing.assert_allclose(gate.score(given), expected, atol=1e-5, err_msg=name)
        below = np.asarray(expected) < float(gate.threshold) - 1e-6
        assert np.asarray(gate.gate(given)).tolist() == below.astype(float).tolist(), name
    assert np.asarray(Open().gate(given)).tolist() == [1.0] * B


def test_a_condition_reads_the_mean_over_the_whole_prompt(model):
    L, D = model.config.layers, model.config.embed
    vector, layer = unit_rows(L, D, seed=3), jnp.asarray([0.0, 1.0, 0.0])
    rule = Gated(Condition(vector, layer, jnp.float32(0), jnp.float32(1)), actions(model, named_span("end"))["add"])
    asked = model.with_prompt("please list three uses of a wooden spoon, my old friend of the forest")
    scores = asked.steered([rule]).answers(PROMPTS, decoding(1))[0].scores
    for prompt, score in zip(PROMPTS, scores, strict=True):
        ids = jnp.asarray([asked.row(prompt).ids])
        resid = captured(model.config, model.params, ids, jnp.ones(ids.shape, bool))["resid"][1, 0]
        h, c = np.asarray(resid, np.float64).mean(0), np.float64(vector[1])
        along = np.tanh((h @ c) * c)
        np.testing.assert_allclose(score, h @ along / np.linalg.norm(h) / np.linalg.norm(along), atol=1e-4)
