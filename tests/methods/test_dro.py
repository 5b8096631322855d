"""DRO: the loss against a completed basis in float64, training against a loop of its own, and what answers by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PROMPTS, decoding, tiny_chat_model

from jaxsafe.chat.soft_prompts import embedded_system, system_span
from jaxsafe.io.store import Store
from jaxsafe.kernels.forward import capture
from jaxsafe.methods.dro import DRO, dro, trained_vectors
from jaxsafe.methods.dro_loss import Probes, fit_probes, loss
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.rows import Row, pad_rows

SYSTEM = "tell me the rules of a quiet game"
ASKED = ("Who invented the kite?", "How do I bake bread?", "Tell me a rule.", "Who invented bread?")
HARMLESS = np.array([True, False, True, False, True, False])
captured = jax.jit(capture, static_argnames=("config", "taps"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model")).with_prompt(SYSTEM)


def random_probes(d=9, seed=0):
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.standard_normal((d, 4)))[0]
    parts = basis, *generator.standard_normal((2, 4))
    return Probes(*(jnp.asarray(part, jnp.float32) for part in parts))


def bce(logit, label):
    p = 1 / (1 + np.exp(-logit))
    return -label * np.log(p) - (1 - label) * np.log(1 - p)


def slow_loss(probes, x, x_0, label):
    """Of one prompt, with the other coordinates written out."""
    basis, comply, harmless = (np.float64(part) for part in (probes.basis, probes.comply, probes.harmless))
    basis = np.linalg.qr(basis)[0] * np.sign(np.sum(np.linalg.qr(basis)[0] * basis, 0))
    random = np.random.default_rng(3).standard_normal((len(x), len(x)))
    whole = np.linalg.qr(np.concatenate([basis, random], 1)[:, : len(x)])[0]
    d = np.float64(x) - np.float64(x_0)
    z, rest = basis.T @ d, whole[:, 4:].T @ d
    return bce(comply @ z, label) + 1e-2 * bce(harmless @ z, label) + 1e-3 * np.mean(rest**2)


def test_the_loss_is_that_of_a_completed_basis():
    probes, generator = random_probes(), np.random.default_rng(1)
    x, x_0 = generator.standard_normal((2, 6, 9)).astype(np.float32) * 2
    label = HARMLESS.astype(np.float32)
    expected = [slow_loss(probes, *each) for each in zip(x, x_0, label, strict=True)]
    np.testing.assert_allclose(loss(probes, x, x_0, label), expected, rtol=1e-5)
    gradient = jax.grad(lambda x: loss(probes, x, x_0, label).sum())(jnp.asarray(x))
    for i, j in [(0, 0), (2, 5), (5, 8)]:
        step = np.eye(9)[j] * 1e-6
        ends = [slow_loss(probes, x[i] + sign * step, x_0[i], label[i]) for sign in (1, -1)]
        assert gradient[i, j] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-6)


def test_probes_find_kinds_and_compliance():
    generator = np.random.default_rng(2)
    states = generator.standard_normal((80, 12)).astype(np.float32) * 0.3
    harmless, complies = np.arange(80) % 2 == 0, np.arange(80) % 4 < 2
    states[:, 3] += 4 * harmless
    states[:, 7] += 4 * complies
    probes = fit_probes(states, np.where(complies, 0.9, 0.2), harmless)
    np.testing.assert_allclose(probes.basis.T @ probes.basis, np.eye(4), atol=1e-5)
    for weights, axis in ((probes.harmless, 3), (probes.comply, 7)):
        along = np.asarray(probes.basis @ weights)
        assert np.argmax(np.abs(along)) == axis and along[axis] > 0
    shift = np.asarray(probes.basis @ probes.comply)[7] * 4  # a share's log-odds
    assert shift == pytest.approx(np.log(9) - np.log(0.25), rel=0.25)
    with pytest.raises(ValueError, match="all 80 are of one kind"):
        fit_probes(states, np.full(80, 0.5), np.ones(80, bool))
    with pytest.raises(ValueError, match="100% of the answers comply"):
        fit_probes(states, np.ones(80), harmless)


def test_a_soft_prompt_of_embeddings_is_the_text(model):
    prompt = embedded_system(model)
    first, count = system_span(model)
    ids = model.row("Why?").ids[first : first + count]
    assert model.tokenizer.hf.decode(list(ids)) == SYSTEM
    soft = model.with_edits({"embed": prompt})
    rows = [
        Row(row.ids[:first] + (9,) * count + row.ids[first + count :], row.instruction_end)
        for row in model.rows(ASKED[:2])
    ]
    expected = model.answers(ASKED[:2], decoding(9))
    np.testing.assert_array_equal(soft.answers(rows, decoding(9)).tokens, expected.tokens)
    assert (model.answers(rows, decoding(9)).tokens != expected.tokens).any()


def test_a_span_holds_all_that_the_system_prompt_changes(model):
    for system in ("x", "7", "a game?", SYSTEM + "."):
        asked = model.with_prompt(system)
        first, count = system_span(asked)
        for prompt in PROMPTS[:2]:
            ids = asked.row(prompt).ids
            assert asked.tokenizer.hf.decode(list(ids[first : first + count])) == system
    with pytest.raises(ValueError, match="tiny is asked without a system prompt"):
        system_span(model.with_prompt(None))


@pytest.mark.slow
def test_training_is_a_plain_loop(model):
    probes, rows = random_probes(model.config.embed), model.rows(PROMPTS)
    settings = DRO(SYSTEM, steps=3, batch_size=6, learning_rate=0.02, clip=0.3)
    found = trained_vectors(model, rows, HARMLESS, probes, settings)

    begun, batch = embedded_system(model), pad_rows(rows, length=80)

    @jax.jit
    def states(vectors):
        edits = {"embed": begun.replace(vectors=vectors)}
        return captured(model.config, model.params, batch.tokens, batch.valid, ("final",), edits)["final"][:, -1]

    textual = states(begun.vectors)
    label = jnp.asarray(HARMLESS, jnp.float32)
    gradient = jax.jit(jax.value_and_grad(lambda v: loss(probes, states(v), textual, label).mean()))
    vectors, m, v, losses = begun.vectors, 0.0, 0.0, []
    for t in range(1, 4):
        value, g = gradient(vectors)
        losses.append(float(value))
        g = g * min(1.0, 0.3 / float(jnp.linalg.norm(g)))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        change = (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)
        vectors = vectors - 0.02 * (change + 0.01 * vectors)
    assert losses[-1] < losses[0]
    moved, expected = found - begun.vectors[0], vectors[0] - begun.vectors[0]
    np.testing.assert_allclose(moved, expected, atol=2e-4)
    assert float(jnp.median(jnp.abs(expected))) > 0.03  # far beyond the tolerance


class EveryThird:
    """Every third answer is a refusal, whatever it says."""

    name, version = "every third", "1"

    def refused(self, prompts, answers):
        return [i % 3 == 0 for i in range(len(answers))]


class Unasked(EveryThird):
    """The same judge, who must not be asked."""

    def refused(self, prompts, answers):
        raise AssertionError("asked again")


@pytest.mark.slow
def test_the_trained_prompt_is_kept(model, tmp_path):
    sets = [PromptSet("a", ASKED, (False, True, False, True), ("",) * 4)]
    settings = DRO(SYSTEM, samples=2, answer_tokens=4, steps=2, batch_size=4, learning_rate=0.1)
    store, plain = Store(tmp_path), model.with_prompt(None)
    found = dro(store, plain, sets, EveryThird(), settings)
    assert found.system == SYSTEM
    vectors = found.edits["embed"].vectors
    assert (np.abs(vectors - embedded_system(model).vectors) > 1e-3).any()
    again = dro(store, plain, sets, Unasked(), settings)
    np.testing.assert_array_equal(again.edits["embed"].vectors, vectors)


def test_a_soft_prompt_goes_with_no_other_system_prompt(model):
    soft = model.with_edits({"embed": embedded_system(model)})
    assert soft.with_prompt().system == SYSTEM
    for prompt in ({"system": "Be short."}, {"raw": True}):
        with pytest.raises(ValueError, match="goes with no other"):
            soft.with_prompt(**prompt)
