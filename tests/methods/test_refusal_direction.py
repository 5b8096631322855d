"""The search for a refusal direction against single passes and plain loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evidences import random_evidence
from exams import JUDGE
from tiny import PROMPTS, tiny_chat_model

from jaxsafe.io.store import Store
from jaxsafe.kernels.ablation import ablation
from jaxsafe.kernels.forward import capture
from jaxsafe.kernels.refusal import ablated_scores, added_log_odds, refusal_log_odds
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.methods.mending_choice import Trial
from jaxsafe.methods.refusal_direction import (
    Search,
    choose_direction,
    end_states,
    false_refusal,
    refusal_tokens,
    template_positions,
)
from jaxsafe.methods.remedies import Bench
from jaxsafe.model.taps import edit
from jaxsafe.model.transformer import forward
from jaxsafe.rows import pad_rows, shared_tokens

REFUSAL = (40, 77)
logits_of = jax.jit(forward, static_argnames=("config", "last"))
captured = jax.jit(capture, static_argnames=("config", "taps"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


def first_logits(model, prompt, edits=None):
    row = pad_rows([model.row(prompt)], length=96)
    return np.float64(logits_of(model.config, model.params, row.tokens, row.valid, edits, 1)[0, 0])


def slow_log_odds(logits):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    own = p[list(REFUSAL)].sum()
    return np.log(own) - np.log(1 - own)


def test_log_odds_are_those_of_the_probabilities():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((5, 100)) * 3, jnp.float32)
    expected = [slow_log_odds(np.float64(row)) for row in logits]
    np.testing.assert_allclose(refusal_log_odds(logits, jnp.asarray(REFUSAL)), expected, atol=1e-4)


@pytest.mark.parametrize("system", [None, "You are kind, and you answer each question with care."])
def test_every_candidate_is_scored_as_by_itself(model, system):
    model = model.with_prompt(system)
    generator = np.random.default_rng(1)
    directions = generator.standard_normal((3, model.config.embed)).astype(np.float32)
    layers, rows = np.array([0, 2, 1], np.int32), model.rows(PROMPTS)
    batch = pad_rows(rows, shared=shared_tokens(rows))
    assert bool(batch.shared) == bool(system)
    start, refusal = (model.config, model.params, batch, directions), jnp.asarray(REFUSAL)
    scores, induced = ablated_scores(*start, refusal), added_log_odds(*start, layers, refusal)
    for c, layer in enumerate(layers):
        unit = jnp.asarray(directions[c] / np.linalg.norm(directions[c]))
        add = np.zeros((model.config.layers, model.config.embed), np.float32)
        add[layer] = directions[c]
        for b, prompt in enumerate(PROMPTS):
            plain = np.float64(jax.nn.log_softmax(first_logits(model, prompt)))
            ablated = first_logits(model, prompt, ablation(model.config, model.params, unit))
            added = first_logits(model, prompt, {"resid": edit(add=jnp.asarray(add))})
            kl = np.sum(np.exp(plain) * (plain - np.float64(jax.nn.log_softmax(ablated))))
            found = [scores.log_odds[c, b], induced[c, b], scores.kl[c, b]]
            np.testing.assert_allclose(found, [slow_log_odds(ablated), slow_log_odds(added), kl], atol=2e-4)


def test_states_are_those_of_the_last_positions(model):
    states = end_states(model, PROMPTS, 3, batch_size=4)
    for prompt, mine in zip(PROMPTS, states, strict=True):
        row = pad_rows([model.row(prompt)], length=96)
        resid = captured(model.config, model.params, row.tokens, row.valid)["resid"][:, 0]
        np.testing.assert_allclose(mine, np.moveaxis(np.asarray(resid[:, ::-1][:, :3]), 1, 0), atol=1e-4)


def test_positions_are_those_that_all_prompts_end_with(model):
    rows = model.rows(PROMPTS)
    assert template_positions(rows) == 2  # <|end|> and <|assistant|>, or with a full stop and a question mark before
    assert template_positions(model.rows(["Why?", "How?"])) >= 3


def test_the_choice_is_the_least_bypass_that_is_allowed(model):
    generator = np.random.default_rng(2)
    candidates = generator.standard_normal((2, model.config.layers, model.config.embed)).astype(np.float32)
    harmful, safe = PROMPTS[:3], PROMPTS[3:]
    search = Search(kl=np.inf, induced=-np.inf, last_share=0.4)
    found = choose_direction(model, candidates, harmful, safe, REFUSAL, search)
    every = {}
    for position in range(2):
        for layer in range(1):  # of three blocks, the last two fifths are left out
            unit = candidates[position, layer] / np.linalg.norm(candidates[position, layer])
            edits = ablation(model.config, model.params, jnp.asarray(unit))
            every[position, layer] = np.mean([slow_log_odds(first_logits(model, p, edits)) for p in harmful])
    assert (found.position, found.layer) == min(every, key=every.get)
    assert found.bypass == pytest.approx(min(every.values()), abs=1e-3)
    np.testing.assert_allclose(np.linalg.norm(found.vector), 1, atol=1e-5)
    assert found.allowed
    strict = choose_direction(model, candidates, harmful, safe, REFUSAL, Search(np.inf, np.inf, 0.4))
    assert str(strict) == f"{found}; no candidate kept within all limits of the search" and not strict.allowed


def test_where_no_candidate_stays_near_the_least_kl_decides(model):
    generator = np.random.default_rng(2)
    candidates = generator.standard_normal((2, model.config.layers, model.config.embed)).astype(np.float32)
    search, asked = Search(kl=np.inf, induced=-np.inf, last_share=0.4), (PROMPTS[:3], PROMPTS[3:], REFUSAL)
    # Twice the same, so that the shapes, and the program, are those of the two.
    each = [choose_direction(model, candidates[[place, place]], *asked, search).kl for place in range(2)]
    found = choose_direction(model, candidates, *asked, dataclasses.replace(search, kl=0.0))
    assert found.kl == pytest.approx(min(each), abs=1e-6) and not found.allowed


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (False, "two or more harmful prompts that the model refuses; there are 0 of 40"),
        (True, "two or more safe prompts that the model answers; there are 0 of 40"),
    ],
)
def test_a_direction_needs_prompts_to_make_candidates_of_and_others_to_choose_on(model, tmp_path, refused, message):
    evidence = dataclasses.replace(random_evidence(), refused=np.full(40, refused))
    with pytest.raises(ValueError, match=message):
        _ = Bench(model, evidence, Store(tmp_path), Trial(JUDGE, Decoding(2))).refusal


def test_false_refusal_loses_the_harmful_part():
    generator = np.random.default_rng(3)
    v_or, v_harm = (generator.standard_normal((1, 2, 6)).astype(np.float32) for _ in range(2))
    whole, half = false_refusal(v_or, v_harm), false_refusal(v_or, v_harm, 0.5)
    np.testing.assert_allclose(np.sum(whole * v_harm, -1), 0, atol=1e-5)
    np.testing.assert_allclose(half, (v_or + whole) / 2, atol=1e-6)


def test_refusal_tokens_are_those_that_refusals_begin_with():
    assert refusal_tokens(random_evidence()) == (7,)
    e = random_evidence()
    e.tokens[:, 0] = 9
    with pytest.raises(ValueError, match="no token of their own"):
        refusal_tokens(e)
