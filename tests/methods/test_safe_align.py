"""Safe-Align against its formula in float64, vector by vector and text by text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA
from tiny import PROMPTS, decoding, tiny_chat_model

from jaxsafe.kernels.forward import capture
from jaxsafe.methods.safe_align import SafeAlign, in_context_vector, safe_align, text_states, turn_away
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.turn import Turn
from jaxsafe.rows import pad_rows

ASKED = PROMPTS[:2]
captured = jax.jit(capture, static_argnames=("config", "taps"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(model):
    return (
        [model.row(prompt, "No, I will not.") for prompt in ASKED],
        [model.row(prompt, "Sure, here is a plan:") for prompt in ASKED],
    )


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def slow_turn(x, v, alpha):
    """As published, v pointing from safe to unsafe."""
    x, v = np.float64(x), np.float64(v)
    scale = 1 + np.maximum(0, np.sum(unit(x) * unit(v), -1, keepdims=True))
    return np.linalg.norm(x, axis=-1, keepdims=True) * unit(unit(x) - 0.1 * alpha * scale * unit(v))


def test_the_edit_is_the_published_formula_and_keeps_lengths():
    generator = np.random.default_rng(0)
    x, v = generator.standard_normal((2, 5, 8)).astype(np.float32) * 3, generator.standard_normal(8).astype(np.float32)
    positions = np.zeros((2, 5), np.int32)
    for alpha in (0.12, 6.0):
        found = np.asarray(Turn(jnp.asarray(-v), jnp.float32(0.1 * alpha))(jnp.asarray(x), positions))
        np.testing.assert_allclose(found, slow_turn(x, v, alpha), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(Turn(jnp.asarray(-v), jnp.float32(0))(jnp.asarray(x), positions), x)
    assert not np.asarray(Turn(jnp.asarray(-v), jnp.float32(1))(jnp.zeros((1, 1, 8)), positions)).any()


def test_the_vector_is_the_mean_and_a_unit_axis():
    differences = np.random.default_rng(1).standard_normal((7, 3, 4)).astype(np.float32) + 0.5
    pca = PCA(1).fit(differences.reshape(7, -1).astype(np.float64))
    axis = pca.components_[0] * np.sign(pca.components_[0] @ pca.mean_)
    np.testing.assert_allclose(in_context_vector(differences).ravel(), pca.mean_ + axis, atol=1e-5)
    np.testing.assert_allclose(in_context_vector(differences[:1]), differences[0], atol=1e-6)


def test_texts_are_read_at_their_last_tokens(model, pairs):
    rows = [*pairs[0], *pairs[1]]
    found = text_states(model, rows, SafeAlign(batch_size=16))
    for row, states in zip(rows, found, strict=True):
        one = pad_rows([row], length=100)
        every = np.float64(captured(model.config, model.params, one.tokens, one.valid)["resid"][:, 0])
        np.testing.assert_allclose(states, every[:, -4:].mean(1), atol=1e-4)


def test_the_model_answers_with_the_edit_in_every_block(model, pairs):
    aligned = safe_align(model, *pairs, SafeAlign(alpha=8.0, layers=LayerRange(1, 3)))
    states = text_states(model, [*pairs[1], *pairs[0]])
    vector = in_context_vector(states[:2] - states[2:])
    batch = pad_rows(model.rows(ASKED))
    taken = [
        captured(model.config, model.params, batch.tokens, batch.valid, ("down", "mlp_out"), edits)
        for edits in (None, aligned.edits)
    ]
    for layer in range(3):  # without a norm behind it, "down" is what "mlp_out" is given
        given, edited = (np.asarray(taken[1][name][layer])[batch.valid] for name in ("down", "mlp_out"))
        np.testing.assert_allclose(edited, slow_turn(given, vector[layer], 8.0 * (layer > 0)), rtol=1e-4, atol=1e-4)
    plain, turned = (each.answers(ASKED, decoding(9)).tokens for each in (model, aligned))
    assert (plain != turned).any()
    same = model.with_edits({"mlp_out": turn_away(vector, SafeAlign(alpha=0.0))})
    np.testing.assert_array_equal(same.answers(ASKED, decoding(9)).tokens, plain)


def test_texts_that_are_no_pairs_are_refused(model, pairs):
    with pytest.raises(ValueError, match="2 safe and 1 unsafe texts are no pairs"):
        safe_align(model, pairs[0], pairs[1][:1])
