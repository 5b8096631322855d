"""Several models in one program against each of them by itself."""

import jax
import numpy as np
import pytest
from tiny import PROMPTS, decoding, random_rows, tiny_chat_model

from jaxsafe.chat.answers import collected
from jaxsafe.chat.stacked import Stacked
from jaxsafe.kernels.directions import moved_stack, random_direction

OFFSETS = np.array([[-0.4], [0.0], [0.1]], np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def stacked(model):
    return Stacked(model, moved_stack(model.params, (random_direction(model.config, model.params, 0),), OFFSETS))


def alone(stacked, place):
    return stacked.model.with_params(jax.tree.map(lambda a: a[place], stacked.stack))


DRAWN = pytest.param(decoding(9, temperature=0.8, samples=2), marks=pytest.mark.slow)


@pytest.mark.parametrize("how", [decoding(9), DRAWN], ids=["greedy", "drawn"])
def test_answers_are_those_of_each_model(stacked, how):
    # Every model's own ends are met: a token that the first one says ends its answers early, and not the others'.
    said = alone(stacked, 0).answers(PROMPTS, how).tokens
    how = decoding(9, samples=how.samples, eos=(int(said[0, 2]),), temperature=float(how.sampling.temperature))
    pieces = list(stacked.with_prompt(system="Be brief.").answer_batches(PROMPTS, how, 4))
    for place in range(len(OFFSETS)):
        found = collected((indices, answers[place]) for indices, answers in pieces)
        want = alone(stacked, place).with_prompt(system="Be brief.").answers(PROMPTS, how, 4)
        assert found.texts == want.texts and found.read == want.read
        assert np.array_equal(found.tokens, want.tokens) and np.array_equal(found.lengths, want.lengths)
    assert len(stacked.rules) == len(OFFSETS) and set(stacked.rules) == {None}


def test_texts_are_read_as_by_each_model(stacked):
    rows = random_rows([20, 9, 14], behind=[6, 3, 5])
    for place, (nll, counts) in enumerate(stacked.nll(rows, 2)):
        want, n = alone(stacked, place).nll(rows, 2)
        np.testing.assert_allclose(nll, want, rtol=1e-5)
        assert np.array_equal(counts, n)
    first, second, _ = (nll for nll, _ in stacked.nll(rows, 2))
    assert not np.allclose(first, second)
