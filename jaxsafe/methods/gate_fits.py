"""Gates fitted to labelled prompts, with thresholds from scores of prompts that a fit has not seen.

A gate opens for prompts that it takes for safe. Its threshold lets through a stated share of harmful prompts, which it
keeps on prompts like those that it was fitted to; on others it keeps what `GateReport.by_set` shows.

n prompts, L layers, D embed
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from jaxsafe.chat.model import ChatModel
from jaxsafe.evaluation.stats import rate
from jaxsafe.kernels.gates import Gate, Linear, Transition
from jaxsafe.kernels.steering import PromptStates
from jaxsafe.methods.evidence import Evidence, mean_difference, unit_rows
from jaxsafe.methods.scans import affirmative_ids
from jaxsafe.model.layers import LayerRange
from jaxsafe.records.overrefusal import GateReport, SetShare

Scores = Float[np.ndarray, " n"]
Fit = Callable[[Bool[np.ndarray, " n"]], Gate]
"""(which prompts to fit to) -> a gate, of whatever threshold."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A gate, and what is known of it."""

    gate: Gate
    report: GateReport


def score_of(gate: Gate, evidence: Evidence) -> Scores:
    """The gate's score of every prompt, float32."""
    states = PromptStates(
        *(jnp.swapaxes(jnp.asarray(a), 0, 1) for a in (evidence.at_end, evidence.change, evidence.mean))
    )
    return np.asarray(gate.score(states))


def threshold_of(scores: Scores, harmful: Bool[np.ndarray, " n"], missed: float) -> float:
    """The threshold below which the share `missed` of the harmful prompts lies: the largest that misses no more."""
    own = np.sort(scores[harmful])
    return float(own[int(missed * len(own))])


def fitted(name: str, fit: Fit, evidence: Evidence, missed: float = 0.05, folds: int = 5, seed: int = 0) -> Fitted:
    """The gate that `fit` makes of all prompts, its threshold from scores out of fold at `missed` harmful prompts.

    The threshold's interval is that of 1,000 draws of the harmful prompts with replacement. Raises ValueError where
    there are fewer prompts of a kind than folds.
    """
    harmful = evidence.harmful
    fewest = int(min(harmful.sum(), (~harmful).sum()))
    if fewest < folds:
        raise ValueError(f"a gate of {folds} folds needs as many prompts of each kind; there are {fewest}")
    scores = np.zeros(len(evidence), np.float32)
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for seen, unseen in splits.split(
        np.zeros(len(harmful)), [f"{h}{s}" for h, s in zip(harmful, evidence.source, strict=True)]
    ):
        chosen = np.zeros(len(harmful), bool)
        chosen[seen] = True
        scores[unseen] = score_of(fit(chosen), evidence)[unseen]
    threshold = threshold_of(scores, harmful, missed)
    draws = np.random.default_rng(seed).choice(scores[harmful], (1000, int(harmful.sum())))
    low, high = np.quantile([threshold_of(d, np.ones(len(d), bool), missed) for d in draws], [0.025, 0.975])
    gate = fit(np.ones(len(harmful), bool)).replace(threshold=jnp.float32(threshold))  # type: ignore[attr-defined]
    by_set = tuple(
        SetShare(source, bool(label), rate(list(scores[chosen] < threshold)))
        for source in dict.fromkeys(evidence.source)
        for label in (False, True)
        if (chosen := (np.array(evidence.source) == source) & (harmful == label)).any()
    )
    area = float(roc_auc_score(harmful, scores))
    return Fitted(gate, GateReport(name, area, threshold, (float(low), float(high)), missed, by_set))


def logistic(evidence: Evidence, layers: Sequence[int], penalty: float = 100.0) -> Fit:
    """The mean log-odds of one regularised logistic regression a layer, on standardised states; C = 1 / `penalty`."""

    def fit(chosen: Bool[np.ndarray, " n"]) -> Gate:
        weights = np.zeros(evidence.at_end.shape[1:], np.float32)
        bias = 0.0
        for layer in layers:
            x = evidence.at_end[chosen, layer].astype(np.float64)
            mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
            model = LogisticRegression(C=1 / penalty, max_iter=2000, class_weight="balanced")
            model.fit((x - mean) / scale, evidence.harmful[chosen])
            weights[layer] = model.coef_[0] / scale / len(layers)
            bias += float(model.intercept_[0] - (model.coef_[0] / scale) @ mean) / len(layers)
        return Linear(jnp.asarray(weights), jnp.float32(bias), jnp.float32(0))

    return fit


def projection(evidence: Evidence, layers: LayerRange) -> Fit:
    """The mean projection on the unit difference of the means of harmful and safe prompts, over `layers`."""

    def fit(chosen: Bool[np.ndarray, " n"]) -> Gate:
        sides = (evidence.at_end[chosen & (evidence.harmful == side)] for side in (True, False))
        weights = unit_rows(mean_difference(*sides)) * layers.mask(evidence.at_end.shape[1])[:, None]
        return Linear(jnp.asarray(weights / weights.any(1).sum(), jnp.float32), jnp.float32(0), jnp.float32(0))

    return fit


def transition(model: ChatModel, evidence: Evidence, layers: LayerRange) -> Fit:
    """The classifier of SCANS (arXiv 2408.11491, section 3.3), its reference from the harmful prompts."""
    scored = jnp.asarray(layers.mask(evidence.at_end.shape[1]), jnp.float32)
    affirmative = jnp.asarray(affirmative_ids(model))

    def fit(chosen: Bool[np.ndarray, " n"]) -> Gate:
        reference = evidence.change[chosen & evidence.harmful].mean(0)
        return Transition(jnp.asarray(reference), scored, jnp.float32(0), affirmative)

    return fit
