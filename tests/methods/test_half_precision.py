"""What bfloat16 does to scores, masks and steering of the real model: less than the choices that follow from them."""

import numpy as np
import pytest

from jaxsafe.chat.model import load_chat_model
from jaxsafe.kernels.selection import top
from jaxsafe.kernels.sums import Scoring, gather
from jaxsafe.methods.safety_tuning import builtin_refusals
from jaxsafe.methods.scans import find_directions, read_prompts
from jaxsafe.model.weights import flatten
from jaxsafe.parallel import fetch
from jaxsafe.prompts.sets import load_prompts

pytestmark = pytest.mark.slow
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def models():
    return [load_chat_model("smollm2-135m-instruct", dtype) for dtype in DTYPES]


@pytest.fixture(scope="module")
def prompts():
    return [load_prompts(f"builtin:{name}", split="anchor").prompts for name in ("harmful", "plain")]


@pytest.mark.parametrize("kind", ["snip", "wanda"])
def test_the_weights_that_matter_most_are_the_same(models, prompts, kind):
    masks = []
    for model in models:
        pairs = zip(prompts[0][:8], builtin_refusals(), strict=False)
        rows = [model.row(prompt, refusal) for prompt, refusal in pairs]
        sums = gather(Scoring(kind, batch_size=4), model.config, model.params, rows)
        masks.append(flatten(fetch(top(model.config, sums.scores(model.config, model.params), 0.01))))
    for path, exact in masks[0].items():
        assert (exact & masks[1][path]).sum() >= 0.95 * exact.sum() > 0, path


@pytest.fixture(scope="module")
def scores(models, prompts):
    found = []
    for model in models:
        cosines = read_prompts(model, find_directions(model, *prompts), [*prompts[0][:16], *prompts[1][:16]]).cosines
        found.append(cosines[:, model.config.layers // 3 : -1].mean(1))
    return found


def test_scores_of_prompts_are_the_same(scores):
    moved = np.abs(scores[0] - scores[1])
    assert moved.max() <= 0.002 < 0.1 * scores[0].std() and np.sqrt(np.square(moved).mean()) <= 0.0006
