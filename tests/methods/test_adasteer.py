"""AdaSteer against its formulas in float64, one prompt and one position at a time."""

import jax.numpy as jnp
import numpy as np
import pytest
from evidences import random_evidence
from tiny import PROMPTS, decoding, tiny_chat_model

from jaxsafe.kernels.steering import PromptStates
from jaxsafe.methods.adasteer import PUBLISHED, Coefficient, adasteer
from jaxsafe.model.taps import edit

EVIDENCE = random_evidence()
ALPHA, BETA = Coefficient(2, 0.02, -60, -0.22, -0.08), Coefficient(3, -0.05, -5, -0.75, offset=-0.5)


def double(x):
    return np.asarray(x, np.float64)


def slow_coefficients(h, layer, first, second):
    """clip(f(d)) of each state, with the published form of the coefficients written out."""
    a, b = double(first[:, layer]).mean(0), double(second[:, layer]).mean(0)
    u = (b - a) / np.linalg.norm(b - a)
    return [100 * ((double(x) - a) @ u) / np.linalg.norm(b - a) for x in h]


def test_gates_are_the_published_functions_of_a_prompts_place():
    e = EVIDENCE
    rule = adasteer(e, ALPHA, BETA)
    states = PromptStates(jnp.swapaxes(jnp.asarray(e.at_end), 0, 1))
    refused, answered = e.at_end[e.harmful & e.refused], e.at_end[e.harmful & ~e.refused]
    d_r = slow_coefficients(e.at_end[:, 1], 1, refused, answered)
    d_h = slow_coefficients(e.at_end[:, 2], 2, e.at_end[e.harmful], e.at_end[~e.harmful & e.refused])
    np.testing.assert_allclose(rule.places(states), [d_r, d_h], rtol=1e-3, atol=1e-2)
    alpha = [min(max(0.02 * (d + 60), -0.22), -0.08) for d in d_r]
    beta = [max(-0.05 * (d + 5) - 0.5, -0.75) for d in d_h]
    np.testing.assert_allclose(rule.gate(states), np.stack([alpha, beta], 1), atol=1e-3)
    assert len(set(np.round(alpha, 4))) > 1 and len(set(np.round(beta, 4))) > 1


def test_the_second_direction_has_nothing_of_the_first():
    vectors = double(adasteer(EVIDENCE, ALPHA, BETA).vectors)
    cosines = (
        np.sum(vectors[0] * vectors[1], -1) / np.linalg.norm(vectors[0], axis=-1) / np.linalg.norm(vectors[1], axis=-1)
    )
    np.testing.assert_allclose(cosines, 0, atol=1e-5)


def test_published_coefficients():
    assert PUBLISHED["qwen2.5-7b"][0] == Coefficient(6, 0.1, 140, -0.2, 0)
    alpha, beta = PUBLISHED["llama3.1-8b"]
    assert (alpha.layer, beta.layer) == (9, 14)


def test_both_vectors_are_added_at_the_prompt_alone(tmp_path):
    model = tiny_chat_model(tmp_path)
    e = random_evidence(layers=model.config.layers, embed=model.config.embed)
    rule = adasteer(e, Coefficient(1, 0.01, 0, -2, 2), Coefficient(2, 0.02, 10, -2, 2))
    steered = model.steered([rule]).answers(PROMPTS, decoding(5))[0]
    for prompt, tokens, (alpha, beta) in zip(PROMPTS, steered.tokens, steered.gates, strict=True):
        stop = jnp.asarray([model.row(prompt).instruction_end + 1])
        sum_of_both = alpha * rule.vectors[0] + beta * rule.vectors[1]
        alone = model.with_edits({"resid": edit(add=sum_of_both, stop=stop)}).answers([prompt], decoding(5))
        assert tokens.tolist() == alone.tokens[0].tolist()
    assert (steered.tokens != model.answers(PROMPTS, decoding(5)).tokens).any()


def test_safe_prompts_that_are_refused_are_needed():
    e = random_evidence()
    e.refused[~e.harmful] = False
    with pytest.raises(ValueError, match="safe prompts that the model refuses"):
        adasteer(e, ALPHA, BETA)


def test_layers_that_the_model_lacks_are_named():
    with pytest.raises(ValueError, match="reads layer 9; this model has layers 1 to 4"):
        adasteer(random_evidence(), *PUBLISHED["llama3.1-8b"])
