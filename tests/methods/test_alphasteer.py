"""AlphaSteer against the published matrices in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evidences import random_evidence
from tiny import PROMPTS, decoding, tiny_chat_model

from jaxsafe.kernels.forward import capture
from jaxsafe.methods.alphasteer import alphasteer, null_space_gate
from jaxsafe.model.taps import edit
from jaxsafe.rows import pad_rows

captured = jax.jit(capture, static_argnames=("config", "taps"))


def published(benign, malicious, refusal, share):
    """S = P pinv(X^T X + 10 P^T P) X^T [r; r; ...], as it is written, with all its D x D matrices."""
    b, m = np.float64(benign), np.float64(malicious)
    _, _, vt = np.linalg.svd(b.T @ b)
    kept = int(len(vt) * share)
    q = vt[len(vt) - kept :].T
    p = q @ q.T
    x = m @ p
    target = np.tile(np.float64(refusal), (len(m), 1))
    return p @ np.linalg.pinv(x.T @ x + 10 * p.T @ p) @ x.T @ target


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_matrix_is_a_gate_times_the_refusal_vector(share):
    generator = np.random.default_rng(0)
    benign, malicious = generator.standard_normal((30, 12)), generator.standard_normal((25, 12)) + 1
    refusal = generator.standard_normal(12)
    expected = published(benign, malicious, refusal, share)
    np.testing.assert_allclose(np.outer(null_space_gate(benign, malicious, share), refusal), expected, atol=1e-10)
    assert np.linalg.matrix_rank(expected, tol=1e-8) == 1


def test_benign_states_within_the_kept_span_are_left_alone():
    generator = np.random.default_rng(1)
    benign = generator.standard_normal((40, 5)) @ generator.standard_normal((5, 12))
    gate = null_space_gate(benign, generator.standard_normal((25, 12)) + 1, 7 / 12)
    np.testing.assert_allclose(benign @ gate, 0, atol=1e-8)
    assert np.linalg.norm(gate) > 0.01


def test_answers_are_those_of_the_matrices_applied_layer_by_layer(tmp_path):
    model = tiny_chat_model(tmp_path)
    L, D = model.config.layers, model.config.embed
    e = random_evidence(layers=L, embed=D)
    rule = alphasteer(e, {1: 0.5, 2: 0.4}, 0.8)
    answers = e.harmful & ~e.refused
    refusal = np.float64(e.at_end[e.harmful & e.refused]).mean(0) - np.float64(e.at_end[answers]).mean(0)
    matrices = {
        layer - 1: published(
            e.at_end[~e.harmful][:, layer - 1], e.at_end[e.harmful][:, layer - 1], refusal[layer - 1], s
        )
        for layer, s in {1: 0.5, 2: 0.4}.items()
    }

    steered = model.steered([rule]).answers(PROMPTS, decoding(1))[0]
    for prompt, token in zip(PROMPTS, steered.tokens[:, 0], strict=True):
        row = pad_rows([model.row(prompt)], length=96)
        # What each block adds is read under the edits of the blocks before, so that the matrices see edited states.
        adds = np.zeros((L, D))
        for block in sorted(matrices):
            edits = {"resid": edit(add=jnp.asarray(adds, jnp.float32))}
            resid = captured(model.config, model.params, row.tokens, row.valid, edits=edits)["resid"][block, 0]
            adds[block] = 0.8 * (np.float64(resid[-1]) @ matrices[block])
        edits = {"resid": edit(add=jnp.asarray(adds, jnp.float32))}
        final = captured(model.config, model.params, row.tokens, row.valid, ("final",), edits)["final"][0, -1]
        head = model.params["unembed"] if "unembed" in model.params else model.params["embed"].T
        assert int(token) == int(jnp.argmax(final @ head))


def test_the_first_block_cannot_be_entered_by_a_steered_stream():
    with pytest.raises(ValueError, match="blocks 1 to 3; got 0"):
        alphasteer(random_evidence(), {0: 0.5}, 1.0)
