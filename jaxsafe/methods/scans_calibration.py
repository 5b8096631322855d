"""Choosing SCANS's threshold, layers and strength on prompts that no evaluation uses.

n prompts, L layers
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from jaxsafe.evaluation.judges import Judge
from jaxsafe.evaluation.metrics import best_threshold, rate
from jaxsafe.io.chat_model import ChatModel
from jaxsafe.kernels.generate import Generated, as_arrays, eos_array, sampling_keys
from jaxsafe.kernels.sampling import row_seeds
from jaxsafe.kernels.steering import Steering, answer_divergence, scans_answer, scans_prefill
from jaxsafe.methods.scans import Decoding, Directions, affirmative_ids, rerun_slots, steering_of, unsteered
from jaxsafe.parallel import put_rows
from jaxsafe.text.batches import Batch, map_batches

Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A strength setting and what it did to the calibration prompts (rates in [0, 1], KL in nats a token)."""

    layers: Range
    alpha_rel: float
    refusal_safe: float
    refusal_harmful: float
    kl_benign: float

    @property
    def balanced_accuracy(self) -> float:
        """Mean of compliance on safe prompts and refusal on harmful ones."""
        return (1 - self.refusal_safe + self.refusal_harmful) / 2


def choose_classifier(cosines: np.ndarray, harmful: Sequence[bool], shortest: int | None = None) -> tuple[Range, float]:
    """The layers [first, end) whose mean cosine tells harmful prompts best (AUROC), and the threshold there.

    `cosines` [n, L]. Every contiguous range of at least `shortest` layers (default: a quarter of them) is
    tried; of equally good ones the longest is taken. The threshold has the best balanced accuracy on the ROC.
    """
    L = cosines.shape[1]
    shortest = max(1, L // 4) if shortest is None else shortest
    ranges = [(a, b) for a in range(L) for b in range(a + shortest, L + 1)]
    totals = np.concatenate([np.zeros((len(cosines), 1)), np.cumsum(cosines, axis=1)], axis=1)
    labels = np.asarray(harmful, bool)

    def scores(r: Range) -> np.ndarray:
        return (totals[:, r[1]] - totals[:, r[0]]) / (r[1] - r[0])

    best = max(ranges, key=lambda r: (roc_auc_score(labels, scores(r)), r[1] - r[0]))
    return best, best_threshold(scores(best), labels.tolist())


def layer_candidates(layers: int, vocabulary: dict[str, Any] | None = None) -> list[Range]:
    """Ranges to try: the segment whose projection names refusal most often first, then wider and later ones."""
    third = [(0, layers // 3), (layers // 3, 2 * layers // 3), (2 * layers // 3, layers)]
    ranges = [third[1], (layers // 3, 5 * layers // 6), (layers // 2, 5 * layers // 6)]
    if vocabulary:
        named = [sum(t["refusal"] for t in segment["tokens"]) for segment in vocabulary["segments"]]
        if max(named) and third[int(np.argmax(named))] not in ranges:
            ranges.insert(0, third[int(np.argmax(named))])
    # A control vector cannot name block 0.
    return [(max(1, first), end) for first, end in ranges if end > max(1, first)]


def try_candidates(
    model: ChatModel,
    directions: Directions,
    scored: Range,
    threshold: float,
    candidates: Sequence[tuple[Range, float]],
    prompts: Sequence[str],
    harmful: Sequence[bool],
    judge: Judge,
    decoding: Decoding,
    done: Callable[[int], None] = lambda count: None,
) -> list[Candidate]:
    """Answers the calibration `prompts` under each of `candidates` (layers, alpha_rel) and judges the answers.

    One prefill of a batch serves every candidate, and all of them run the same compiled program. The KL
    divergence is that of the steered from the unsteered next-token distribution along the model's own
    unsteered answers, over the safe prompts that it answers without refusing.
    """
    steerings = [steering_of(directions, scored, threshold, layers, alpha_rel=a) for layers, a in candidates]
    rows = model.rows(prompts)
    numbers = row_seeds(rows)
    affirmative, eos = affirmative_ids(model), np.asarray(eos_array(model.tokenizer.eos_ids))
    new = decoding.max_new_tokens
    sampling = as_arrays(decoding.sampling)

    def call(batch: Batch, indices: np.ndarray) -> dict[str, Any]:
        again = rerun_slots(batch)
        batch = put_rows(batch, model.mesh)
        start = (model.config, model.params, batch)
        prefilled = scans_prefill(*start, affirmative, directions.reference, max(new, len(affirmative)))
        rest = (sampling, sampling_keys(decoding.seed, numbers[indices]), eos, new, again)
        before = scans_answer(*start, prefilled, unsteered(steerings[0]), *rest)
        after, kl = [], []
        for steering in steerings:
            after.append(scans_answer(*start, prefilled, steering, *rest))
            kl.append(answer_divergence(*start, prefilled, steering, before, again)[0])
            done(int((indices >= 0).sum()))
        return {"before": before, "after": tuple(after), "kl": np.stack([np.asarray(k) for k in kl], axis=1)}

    out = map_batches(call, rows, decoding.batch_size, model.row_multiple)
    safe = ~np.asarray(harmful, bool)

    def refused(answers: Generated) -> list[bool | None]:
        return [judge.refused(text) for text in model.tokenizer.decode(answers.tokens, answers.lengths)]

    complied = np.array([verdict is False for verdict in refused(out["before"])]) & safe
    tokens = max(1, int(out["before"].lengths[complied].sum()))
    results = []
    for i, (layers, alpha_rel) in enumerate(candidates):
        verdicts = np.array(refused(out["after"][i]), object)
        results.append(
            Candidate(
                layers=layers,
                alpha_rel=alpha_rel,
                refusal_safe=rate(verdicts[safe]).value or 0.0,
                refusal_harmful=rate(verdicts[~safe]).value or 0.0,
                kl_benign=float(out["kl"][complied, i].sum() / tokens),
            )
        )
    return results


def choose_strength(candidates: Sequence[Candidate], kl_limit: float) -> Candidate:
    """The candidate of the best balanced accuracy among those within `kl_limit`; of equals the least divergence.

    Raises ValueError where none is within the limit.
    """
    allowed = [c for c in candidates if c.kl_benign <= kl_limit]
    if not allowed:
        least = min(c.kl_benign for c in candidates)
        raise ValueError(f"no strength keeps the benign KL within {kl_limit}; the least was {least:.4f}")
    return max(allowed, key=lambda c: (c.balanced_accuracy, -c.kl_benign))


def steering_with(directions: Directions, scored: Range, threshold: float, chosen: Candidate) -> Steering:
    """The `Steering` of a chosen candidate."""
    return steering_of(directions, scored, threshold, chosen.layers, alpha_rel=chosen.alpha_rel)
