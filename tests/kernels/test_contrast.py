"""Decoding by two models against loops that run each by itself, one prompt and one token at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PROMPTS, decoding, tiny_chat_model, tiny_params

from jaxsafe.chat.answers import collected
from jaxsafe.chat.contrasted import Contrasted
from jaxsafe.kernels.contrast import Difference, Expert
from jaxsafe.model.taps import edit
from jaxsafe.model.transformer import forward

NEW = 5
SAFE = "please think of the rules of a quiet game"
logits_of = jax.jit(forward, static_argnames=("config", "last"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


def whole(contrasted, how, **options):
    """The answers to all prompts in their order."""
    pieces = contrasted.answer_batches(PROMPTS, how, **options)
    return collected((indices, answers) for indices, (answers,) in pieces)


def last_logits(model, ids):
    padded = jnp.asarray([[0] * (96 - len(ids)) + list(ids)])
    valid = jnp.arange(96)[None] >= 96 - len(ids)
    return np.float64(logits_of(model.config, model.params, padded, valid, None, 1)[0, 0])


def slow_answer(main, other, prompt, combine):
    first, second, out = list(main.row(prompt).ids), list(other.row(prompt).ids), []
    for step in range(NEW):
        token = combine(last_logits(main, first + out), last_logits(other, second + out), step)
        out.append(int(token))
    return out


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def slow_safe_decoding(main, other, step, strength=2.0, tokens=3, common=4):
    """As published: both lists grow until enough tokens are in both."""
    if step >= tokens:
        return np.argmax(main)
    p, expert = softmax(main), softmax(other)
    by_main, by_expert, k = np.argsort(-main, kind="stable"), np.argsort(-other, kind="stable"), common
    while len(shared := set(by_main[:k].tolist()) & set(by_expert[:k].tolist())) < common:
        k += 1
    scores = {token: max(p[token] + strength * (expert[token] - p[token]), 1e-8) for token in shared}
    return max(scores, key=scores.get)


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.5])
def test_a_model_under_two_prompts(model, strength):
    careful = model.with_prompt(SAFE)
    contrasted = Contrasted(careful, model, Difference(jnp.float32(strength)))
    answers = whole(contrasted, decoding(NEW))
    expected = [slow_answer(careful, model, p, lambda a, b, _: np.argmax(a - strength * (a - b))) for p in PROMPTS]
    assert answers.tokens.tolist() == expected
    assert answers.passes.tolist() == [2] * len(PROMPTS)
    if strength in (0.0, 1.0):  # the one or the other by itself
        alone = (careful if strength == 0 else model).answers(PROMPTS, decoding(NEW))
        assert answers.tokens.tolist() == alone.tokens.tolist()


def test_a_model_that_leans_toward_an_expert(model):
    expert = model.with_params(tiny_params(model.config, seed=4))
    rule = Expert(jnp.float32(2.0), jnp.int32(3), jnp.int32(4))
    found = whole(Contrasted(model, expert, rule), decoding(NEW), batch_size=4)
    expected = [slow_answer(model, expert, p, slow_safe_decoding) for p in PROMPTS]
    assert found.tokens.tolist() == expected
    assert expected != [ids.tolist() for ids in model.answers(PROMPTS, decoding(NEW)).tokens]


def test_an_answer_ends_at_its_end(model):
    plain = model.answers(PROMPTS, decoding(NEW)).tokens
    ends = (int(plain[0, 2]),)
    contrasted = Contrasted(model, model, Difference(jnp.float32(0.7)))
    found, alone = whole(contrasted, decoding(NEW, eos=ends)), model.answers(PROMPTS, decoding(NEW, eos=ends))
    assert found.lengths.tolist() == alone.lengths.tolist()
    assert min(found.lengths) < NEW


def test_what_cannot_be_contrasted_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="differ in configuration"):
        other = dataclasses.replace(model, config=dataclasses.replace(model.config, context=99))
        Contrasted(model, other, Difference(jnp.float32(1)))
    with pytest.raises(ValueError, match="models with edits"):
        shape = (model.config.layers, model.config.embed)
        Contrasted(model.with_edits({"resid": edit(add=jnp.zeros(shape))}), model, Difference(jnp.float32(1)))


def test_another_prompt_reaches_both_models_or_is_refused(model):
    expert = model.with_params(tiny_params(model.config, seed=4))
    rule = Expert(jnp.float32(2.0), jnp.int32(3), jnp.int32(4))
    asked = Contrasted(model, expert, rule).with_prompt(SAFE)
    assert (asked.model.system, asked.other.system) == (SAFE, SAFE)
    two = Contrasted(model.with_prompt(SAFE), model, Difference(jnp.float32(1)))
    assert two.with_prompt().model.system == SAFE
    for prompt in ({"system": "Be short."}, {"raw": True}):
        with pytest.raises(ValueError, match="cannot be asked under a third"):
            two.with_prompt(**prompt)
