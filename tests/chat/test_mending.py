"""Answer first, mend second, against answers that are made one prompt and one rule at a time."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PROMPTS, decoding, tiny_chat_model

from jaxsafe.chat.mending import Mending
from jaxsafe.chat.model import load_chat_model
from jaxsafe.kernels.actions import Add, Gated, named_span
from jaxsafe.kernels.gates import Linear
from jaxsafe.model.taps import edit
from jaxsafe.parallel import parse_mesh

NEW = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@dataclasses.dataclass(frozen=True)
class Listed:
    """Refusals are the texts of a list."""

    texts: frozenset[str]
    name: str = "listed"
    version: str = "1"

    def refused(self, prompts, answers):
        return [answer in self.texts for answer in answers]


def rule(model, seed, threshold, size=3.0):
    L, D = model.config.layers, model.config.embed
    generator = np.random.default_rng(seed)
    vectors, weights = (jnp.asarray(generator.standard_normal((L, D)), jnp.float32) for _ in range(2))
    return Gated(
        Linear(weights, jnp.float32(0), jnp.float32(threshold)), Add(size * vectors / D**0.5, named_span("end"))
    )


def alone(model, rule, prompt):
    """The answer to one prompt under the action of `rule`, by edits of the model."""
    end = model.row(prompt).instruction_end
    edits = {"resid": edit(add=rule.action.vectors, start=end, stop=jnp.asarray([end + 1]))}
    return model.with_edits(edits).answers([prompt], decoding(NEW)).texts[0]


def test_only_refusals_of_prompts_that_the_gate_takes_for_safe_are_answered_again(model):
    plain = model.answers(PROMPTS, decoding(NEW)).texts
    first, second = rule(model, 1, 0.0), rule(model, 2, np.inf)
    scores = model.steered([first]).answers(PROMPTS, decoding(NEW), batch_size=4)[0].scores
    first = rule(model, 1, float(np.median(scores)))
    # Refused are all but one plain answer, and one of the first rule's own answers.
    by_first, by_second = ([alone(model, r, p) for p in PROMPTS] for r in (first, second))
    still = next(a for a, s in zip(by_first, scores, strict=True) if s < np.median(scores))
    judge = Listed(frozenset([*plain[1:], still]) - frozenset(by_second))
    expected, passes = [], []
    for i in range(len(PROMPTS)):
        answer, made = plain[i], 1
        candidates = [(by_first[i], scores[i] < np.median(scores)), (by_second[i], True)]
        current = answer
        for other, opened in candidates:
            if current in judge.texts and opened:
                made, current = made + 1, other
        expected.append(answer if current in judge.texts else current)
        passes.append(made)
    own, mended = model.steered([None, Mending((first, second), judge)]).answers(PROMPTS, decoding(NEW), batch_size=4)
    assert own.texts == plain
    assert list(mended.texts) == expected
    assert mended.passes.tolist() == passes
    assert set(passes) >= {1, 2, 3}
    np.testing.assert_allclose(mended.scores, scores, atol=1e-5)
    assert mended.harmful.tolist() == [bool(s >= np.median(scores)) for s in scores]
    assert own.passes is None


def test_an_answer_that_stays_a_refusal_is_the_first_one(model):
    plain = model.answers(PROMPTS, decoding(NEW)).texts
    one = rule(model, 2, np.inf)
    everything = Listed(frozenset([*plain, *(alone(model, one, p) for p in PROMPTS)]))
    mended = model.steered([Mending((one,), everything)]).answers(PROMPTS, decoding(NEW))[0]
    assert mended.texts == plain
    assert mended.passes.tolist() == [2] * len(PROMPTS)


def test_texts_that_are_read_are_left_alone(model):
    rows = [model.row(prompt, " of the old kite") for prompt in PROMPTS]
    mending = Mending((rule(model, 2, np.inf),), Listed(frozenset()))
    plain, mended = model.steered([None, mending]).nll(rows)
    np.testing.assert_array_equal(plain[0], mended[0])
    assert (model.steered([mending.rules[0]]).nll(rows)[0][0] != plain[0]).all()


def test_mending_needs_a_rule():
    with pytest.raises(ValueError, match="at least one rule"):
        Mending((), Listed(frozenset()))


@pytest.mark.slow
def test_sharded_models_mend_alike(folder):
    single, sharded = (load_chat_model(folder, "float32", mesh) for mesh in (None, parse_mesh("data:4,model:2")))
    one = rule(single, 2, np.inf)
    judge = Listed(frozenset(single.answers(PROMPTS, decoding(NEW)).texts[1:]))
    found = [m.steered([Mending((one,), judge)]).answers(PROMPTS, decoding(NEW))[0] for m in (single, sharded)]
    assert found[0].texts == found[1].texts
    assert found[0].passes.tolist() == found[1].passes.tolist()
    assert max(found[0].passes) == 2
