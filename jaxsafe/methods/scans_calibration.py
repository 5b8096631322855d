"""Choosing SCANS's threshold, layers and strength on prompts that no evaluation uses.

n prompts, L layers
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score

from jaxsafe.evaluation.judges import Judge
from jaxsafe.evaluation.metrics import best_threshold, rate
from jaxsafe.io.chat_model import ChatModel
from jaxsafe.kernels.generate import Generated, as_arrays, eos_array, sampling_keys
from jaxsafe.kernels.sampling import row_seeds
from jaxsafe.kernels.steering import Steering, answer_divergence, rerun_slots, scans_answer, scans_prefill
from jaxsafe.methods.scans import Decoding, Directions, affirmative_ids, steering_of, unsteered
from jaxsafe.parallel import fetch, put_rows
from jaxsafe.text.batches import Batch, map_batches
from jaxsafe.text.chat import check_context

Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting and what it did to the calibration prompts (rates in [0, 1], KL in nats a token)."""

    layers: Range
    alpha_rel: float
    threshold: float
    refusal_safe: float
    refusal_harmful: float
    kl_benign: float

    @property
    def balanced_accuracy(self) -> float:
        """Mean of compliance on safe prompts and refusal on harmful ones."""
        return (1 - self.refusal_safe + self.refusal_harmful) / 2


@dataclasses.dataclass(frozen=True)
class Trial:
    """Verdicts on the calibration prompts' answers: True where refused, None where that could not be told.

    before: unsteered [n]; toward, away: steered toward refusal and away from it, by (layers, alpha_rel), [n]
    each. Which of the two a prompt gets is then a matter of the threshold alone.
    """

    before: list[bool | None]
    toward: dict[tuple[Range, float], list[bool | None]]
    away: dict[tuple[Range, float], list[bool | None]]
    answers: Generated


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

    # Rounded, since sums of equal areas differ in their last bits and would decide between equals.
    best = max(ranges, key=lambda r: (round(roc_auc_score(labels, scores(r)), 12), r[1] - r[0]))
    return best, best_threshold(scores(best), labels.tolist())


def layer_candidates(layers: int, vocabulary: dict[str, Any] | None = None) -> list[Range]:
    """Ranges to try: the third whose projection names refusal most often, the middle third, and the one behind it."""
    third = [(0, layers // 3), (layers // 3, 2 * layers // 3), (2 * layers // 3, layers)]
    ranges = [third[1], (layers // 2, 5 * layers // 6)]
    if vocabulary:
        named = [sum(t["refusal"] for t in segment["tokens"]) for segment in vocabulary["segments"]]
        if max(named) and third[int(np.argmax(named))] not in ranges:
            ranges.insert(0, third[int(np.argmax(named))])
    # A control vector cannot name block 0.
    return list(dict.fromkeys((max(1, first), end) for first, end in ranges if end > max(1, first)))


def toward(steering: Steering) -> Steering:
    """`steering` that takes every prompt for harmful."""
    return steering.replace(threshold=jnp.float32(-jnp.inf))  # type: ignore[attr-defined]


def away(steering: Steering) -> Steering:
    """`steering` that takes every prompt for safe."""
    return steering.replace(threshold=jnp.float32(jnp.inf))  # type: ignore[attr-defined]


def try_strengths(
    model: ChatModel,
    directions: Directions,
    settings: Sequence[tuple[Range, float]],
    prompts: Sequence[str],
    judge: Judge,
    decoding: Decoding,
    done: Callable[[int], None] = lambda count: None,
) -> Trial:
    """Answers `prompts` under each of `settings` (layers, alpha_rel), toward refusal and away from it.

    One prefill of a batch serves all of them, and all of them run the same compiled program. `done(n)` hears
    of n prompts answered under one setting.
    """
    L = len(directions.norm)
    steerings = [steering_of(directions, (0, L), 0.0, layers, alpha_rel=a) for layers, a in settings]
    rows = model.rows(prompts)
    numbers = row_seeds(rows)
    affirmative, eos = affirmative_ids(model), np.asarray(eos_array(model.tokenizer.eos_ids))
    new = decoding.max_new_tokens
    check_context(rows, model.config.context, max(new, len(affirmative)))

    def call(batch: Batch, indices: np.ndarray) -> dict[str, Any]:
        again = rerun_slots(batch)
        batch = put_rows(batch, model.mesh)
        start = (model.config, model.params, batch)
        prefilled = scans_prefill(*start, affirmative, directions.reference, max(new, len(affirmative)))
        rest = (as_arrays(decoding.sampling), sampling_keys(decoding.seed, numbers[indices]), eos, new, again)
        out: dict[str, Any] = {"before": scans_answer(*start, prefilled, unsteered(steerings[0]), *rest), "steered": []}
        for steering in steerings:
            signed = (toward(steering), away(steering))
            out["steered"].append([scans_answer(*start, prefilled, s, *rest) for s in signed])
            done(int((indices >= 0).sum()))
        return out

    out = map_batches(call, rows, decoding.batch_size, model.row_multiple)

    def refused(answers: Generated) -> list[bool | None]:
        return [judge.refused(text) for text in model.tokenizer.decode(answers.tokens, answers.lengths)]

    return Trial(
        before=refused(out["before"]),
        toward={setting: refused(both[0]) for setting, both in zip(settings, out["steered"], strict=True)},
        away={setting: refused(both[1]) for setting, both in zip(settings, out["steered"], strict=True)},
        answers=out["before"],
    )


def outcome(trial: Trial, setting: tuple[Range, float], scores: np.ndarray, threshold: float) -> list[bool | None]:
    """The verdicts under `setting` when prompts of `scores` [n] are told apart at `threshold`."""
    told = zip(trial.toward[setting], trial.away[setting], scores >= threshold, strict=True)
    return [t if harmful else a for t, a, harmful in told]


def refusals(verdicts: Sequence[bool | None], harmful: Sequence[bool]) -> tuple[float, float]:
    """Refusal rates of safe and of harmful prompts."""
    pairs = list(zip(verdicts, harmful, strict=True))
    safe, unsafe = (rate(v for v, h in pairs if h is side).value or 0.0 for side in (False, True))
    return safe, unsafe


def best_outcome(
    trial: Trial, setting: tuple[Range, float], scores: np.ndarray, harmful: Sequence[bool], max_drop: float
) -> float:
    """The threshold whose outcome under `setting` has the best balanced refusal accuracy.

    Only thresholds are taken that lower the refusal of harmful prompts by no more than `max_drop`; where none
    does, the one that lowers it least. Thresholds lie in the middle between neighbouring scores; of equally
    good ones the highest is taken, which steers the fewest prompts toward refusal.
    """
    levels = np.unique(scores)
    middles = np.concatenate([[levels[0] - 1e-3], (levels[:-1] + levels[1:]) / 2, [levels[-1] + 1e-3]])
    floor = refusals(trial.before, harmful)[1] - max_drop

    def merit(threshold: float) -> tuple[float, float, float]:
        safe, unsafe = refusals(outcome(trial, setting, scores, threshold), harmful)
        return (min(0.0, unsafe - floor), unsafe - safe, threshold)

    return float(max(middles, key=merit))


def benign_divergence(
    model: ChatModel,
    prompts: Sequence[str],
    answers: Generated,
    steerings: Sequence[Steering],
    batch_size: int = 32,
    done: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """KL(unsteered || steered), nats a token, along the `answers` [n, new] to `prompts`, for each steering."""
    affirmative = affirmative_ids(model)

    def call(batch: Batch, indices: np.ndarray) -> Any:
        again = rerun_slots(batch)
        placed = put_rows(batch, model.mesh)
        given = put_rows(Generated(answers.tokens[indices], answers.lengths[indices] * (indices >= 0)), model.mesh)
        slots = max(answers.tokens.shape[1], len(affirmative))
        start = (model.config, model.params, placed)
        prefilled = scans_prefill(*start, affirmative, steerings[0].reference, slots)
        kl = []
        for steering in steerings:
            kl.append(fetch(answer_divergence(*start, prefilled, steering, given, again)[0]))
            done(int((indices >= 0).sum()))
        return np.stack(kl, axis=1)

    sums = map_batches(call, model.rows(prompts), batch_size, model.row_multiple)
    return [float(total) for total in sums.sum(0) / max(1, int(answers.lengths.sum()))]


def choose_strength(candidates: Sequence[Candidate], kl_limit: float, least_refusal: float) -> Candidate:
    """The candidate of the best balanced accuracy within `kl_limit` that refuses harmful prompts often enough.

    Among those that refuse at least the share `least_refusal` of harmful prompts, or, where none does, among
    all; of equally good ones the one of least divergence. Raises ValueError where none is within the limit.
    """
    allowed = [c for c in candidates if c.kl_benign <= kl_limit]
    if not allowed:
        least = min(c.kl_benign for c in candidates)
        raise ValueError(f"no strength keeps the benign KL within {kl_limit}; the least was {least:.4f}")
    firm = [c for c in allowed if c.refusal_harmful >= least_refusal]
    return max(firm or allowed, key=lambda c: (c.balanced_accuracy, -c.kl_benign))


def calibrate(
    model: ChatModel,
    directions: Directions,
    scored: Range,
    settings: Sequence[tuple[Range, float]],
    prompts: Sequence[str],
    harmful: Sequence[bool],
    scores: np.ndarray,
    judge: Judge,
    decoding: Decoding,
    kl_limit: float,
    max_drop: float,
    threshold: float | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> tuple[Candidate, list[Candidate]]:
    """The chosen candidate and all of them, one a setting, each at its own best threshold or at the given one.

    `scores` [n] are the classifier's for `prompts`, over the layers `scored`. The divergence is measured on
    up to one batch of the safe prompts that the model answers without refusing, along its own answers.
    """
    trial = try_strengths(model, directions, settings, prompts, judge, decoding, done)
    complied = [i for i, (v, h) in enumerate(zip(trial.before, harmful, strict=True)) if v is False and not h]
    if not complied:
        raise ValueError("the model refuses every safe calibration prompt; the divergence of answers cannot be told")
    some = np.array(complied)[np.linspace(0, len(complied) - 1, min(len(complied), decoding.batch_size)).astype(int)]
    thresholds = [
        best_outcome(trial, setting, scores, harmful, max_drop) if threshold is None else threshold
        for setting in settings
    ]
    steerings = [
        steering_of(directions, scored, at, layers, alpha_rel=a)
        for (layers, a), at in zip(settings, thresholds, strict=True)
    ]
    answers = Generated(trial.answers.tokens[some], trial.answers.lengths[some])
    divergences = benign_divergence(model, [prompts[i] for i in some], answers, steerings, decoding.batch_size)
    candidates = [
        Candidate(setting[0], setting[1], at, *refusals(outcome(trial, setting, scores, at), harmful), kl)
        for setting, at, kl in zip(settings, thresholds, divergences, strict=True)
    ]
    least = refusals(trial.before, harmful)[1] - max_drop
    return choose_strength(candidates, kl_limit, least), candidates
