"""Strengths by divergence against a fine scan."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from evidences import random_evidence
from tiny import PROMPTS, decoding, tiny_chat_model

from jaxsafe.kernels.actions import Add, Gated, named_span
from jaxsafe.kernels.gates import Open
from jaxsafe.methods.dose import benign_answers, divergences_of, strength_of_kl


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    model = tiny_chat_model(tmp_path_factory.mktemp("model"))
    answers = model.answers(PROMPTS, decoding(6))
    everything = np.ones(len(PROMPTS), bool)
    e = dataclasses.replace(
        random_evidence(n=len(PROMPTS)),
        prompts=PROMPTS,
        harmful=~everything,
        refused=~everything,
        tokens=answers.tokens,
        lengths=answers.lengths,
    )
    direction = jnp.asarray(np.random.default_rng(0).standard_normal((model.config.layers, model.config.embed)))

    def rule(strength):
        return Gated(Open(), Add(jnp.float32(strength) * direction.astype(jnp.float32), named_span("end+4")))

    return model, e, rule


def test_the_strength_moves_safe_answers_by_the_stated_nats(case):
    model, e, rule = case
    benign = benign_answers(model, e)
    strength = strength_of_kl(model, rule, 0.2, benign)
    below, above = divergences_of(model, [rule(strength), rule(strength + 1 / 2**11)], benign)
    assert below <= 0.2 < above + 0.02
    assert abs(below - 0.2) < 0.02


def test_a_weak_rule_has_the_highest_strength(case):
    model, e, rule = case
    assert strength_of_kl(model, rule, 1e6, benign_answers(model, e), highest=0.5) == 0.5


def test_no_rule_moves_nothing(case):
    model, e, rule = case
    assert divergences_of(model, [None, rule(0.0)], benign_answers(model, e)) == pytest.approx([0, 0], abs=1e-6)


def test_safe_answers_are_needed(case):
    model, e, _ = case
    with pytest.raises(ValueError, match="answers none of the safe prompts"):
        benign_answers(model, dataclasses.replace(e, refused=np.ones(len(PROMPTS), bool)))
