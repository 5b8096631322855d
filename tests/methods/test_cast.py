"""CAST's condition against plain loops."""

import numpy as np
from evidences import random_evidence
from sklearn.decomposition import PCA
from sklearn.metrics import f1_score

from jaxsafe.methods.cast import best_f1, condition, principal_directions
from jaxsafe.methods.gate_fits import score_of

EVIDENCE = random_evidence(layers=3)


def test_directions_are_first_principal_components_turned_toward_the_first_kind():
    first, second = EVIDENCE.mean[EVIDENCE.harmful], EVIDENCE.mean[~EVIDENCE.harmful]
    assert len(first) == len(second)  # so that the mean of means is the mean of all, about which PCA is taken
    for layer, vector in enumerate(principal_directions(first, second)):
        expected = PCA(1).fit(np.concatenate([first, second])[:, layer].astype(np.float64)).components_[0]
        assert abs(abs(vector @ expected) - 1) < 1e-5
        assert vector @ (first[:, layer].mean(0) - second[:, layer].mean(0)) >= 0


def test_the_best_f1_is_the_best_of_all_thresholds():
    generator = np.random.default_rng(0)
    scores, harmful = generator.standard_normal(30).astype(np.float32), generator.random(30) < 0.4
    f1, threshold = best_f1(scores, harmful)
    every = {float(t): f1_score(harmful, scores >= t) for t in scores}
    assert abs(f1 - max(every.values())) < 1e-12 and abs(every[threshold] - f1) < 1e-12


def test_the_condition_is_the_best_of_every_layer_and_sign():
    gate = condition(EVIDENCE)
    opened = np.asarray(score_of(gate, EVIDENCE) < float(gate.threshold))
    mine = f1_score(EVIDENCE.harmful, ~opened)
    for layer in range(3):
        for sign in (1, -1):
            here = gate.replace(layer=(np.arange(3) == layer).astype(np.float32), sign=np.float32(sign))
            assert best_f1(score_of(here, EVIDENCE), EVIDENCE.harmful)[0] <= mine + 1e-9
