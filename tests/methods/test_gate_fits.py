"""Gates fitted to labelled prompts against scikit-learn on its own and against plain counting."""

import jax.numpy as jnp
import numpy as np
import pytest
from evidences import random_evidence
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jaxsafe.methods import gate_fits
from jaxsafe.model.layers import LayerRange

EVIDENCE = random_evidence(n=60)
EVERYONE = np.ones(60, bool)


def test_the_logistic_gate_is_the_mean_of_the_regressions_of_its_layers():
    gate = gate_fits.logistic(EVIDENCE, (1, 3), penalty=100.0)(EVERYONE)
    odds = []
    for layer in (1, 3):
        regression = LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000)
        x = EVIDENCE.at_end[:, layer].astype(np.float64)
        odds.append(make_pipeline(StandardScaler(), regression).fit(x, EVIDENCE.harmful).decision_function(x))
    np.testing.assert_allclose(gate_fits.score_of(gate, EVIDENCE), np.mean(odds, 0), atol=1e-4)


def test_the_projection_is_that_on_the_unit_difference_of_means():
    chosen = np.arange(60) < 40
    gate = gate_fits.projection(EVIDENCE, LayerRange(1, 3))(chosen)
    scores = []
    for layer in (1, 2):
        x = EVIDENCE.at_end[:, layer].astype(np.float64)
        v = x[chosen & EVIDENCE.harmful].mean(0) - x[chosen & ~EVIDENCE.harmful].mean(0)
        scores.append(x @ v / np.linalg.norm(v))
    np.testing.assert_allclose(gate_fits.score_of(gate, EVIDENCE), np.mean(scores, 0), atol=1e-4)


@pytest.mark.parametrize("missed", [0.0, 0.05, 0.21])
def test_a_threshold_misses_the_stated_share_and_no_more(missed):
    scores, harmful = np.random.default_rng(0).standard_normal(50), np.arange(50) < 30
    threshold = gate_fits.threshold_of(scores, harmful, missed)
    below = (scores[harmful] < threshold).sum()
    assert below <= missed * 30 < below + 1


def test_scores_are_those_of_fits_that_have_not_seen_the_prompt():
    seen: list[np.ndarray] = []
    fit = gate_fits.logistic(EVIDENCE, (2,))

    def watched(chosen):
        seen.append(chosen.copy())
        return fit(chosen)

    found = gate_fits.fitted("regression", watched, EVIDENCE, missed=0.1, folds=5)
    folds, last = seen[:-1], seen[-1]
    assert last.all() and len(folds) == 5
    assert (sum(~fold for fold in folds) == 1).all()
    scores = np.zeros(60)
    for fold in folds:
        scores[~fold] = gate_fits.score_of(fit(fold), EVIDENCE)[~fold]
    assert found.report.threshold == pytest.approx(gate_fits.threshold_of(scores, EVIDENCE.harmful, 0.1), abs=1e-5)
    assert found.report.auroc == pytest.approx(roc_auc_score(EVIDENCE.harmful, scores))
    assert found.report.interval[0] <= found.report.threshold <= found.report.interval[1]
    by_set = {(s.set, s.harmful): s.opened for s in found.report.by_set}
    mine = [s < found.report.threshold for s, name in zip(scores, EVIDENCE.source, strict=True) if name == "lookalike"]
    assert by_set["lookalike", False].value == pytest.approx(np.mean(mine))
    assert float(found.gate.threshold) == pytest.approx(found.report.threshold)
    assert by_set.keys() == {("harmful", True), ("lookalike", False), ("plain", False)}


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="as many prompts of each kind; there are 4"):
        gate_fits.fitted("regression", gate_fits.logistic(random_evidence(n=8), (1,)), random_evidence(n=8))


def test_a_gate_opens_for_prompts_that_it_takes_for_safe():
    found = gate_fits.fitted("regression", gate_fits.logistic(EVIDENCE, (1, 2)), EVIDENCE, missed=0.05)
    scores = gate_fits.score_of(found.gate, EVIDENCE)
    opened = jnp.where(scores < found.gate.threshold, 1, 0)
    assert opened[~EVIDENCE.harmful].mean() > opened[EVIDENCE.harmful].mean()
