"""Choosing SCANS's threshold, layers and strength on prompts that no evaluation uses.

n prompts, L layers
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score

from jaxsafe.chat.answers import Answers
from jaxsafe.chat.model import ChatModel
from jaxsafe.chat.steered import Steered
from jaxsafe.evaluation.judges.broken import BrokenJudge
from jaxsafe.evaluation.judges.judge import Judge
from jaxsafe.evaluation.judges.keyword import judge
from jaxsafe.evaluation.language import likelihoods
from jaxsafe.evaluation.stats import best_threshold
from jaxsafe.io.store import Log, Store, by_batch
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.kernels.steering import Steering
from jaxsafe.methods.scans import Directions, Reading, directions_identity, steering_of
from jaxsafe.model.layers import LayerRange
from jaxsafe.progress import Progress, silent
from jaxsafe.prompts.roles import labelled
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.records.run import Json, Outcome, from_json, outcome, plain
from jaxsafe.records.scans import Candidate, Choice, Strength, Vocabulary
from jaxsafe.rows import data_sha256

SCANS_JUDGE = judge("scans")
Setting = tuple[LayerRange, float]
"""Layers to steer, and alpha_rel."""
Outcomes = list[Outcome | None]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Labelled prompts that settings are tried on, how answers to them are made and judged, and what is allowed.

    kl_limit: nats a token on safe prompts that the model answers anyway; max_drop: of the refusal rate of harmful
    prompts; broken: tells broken answers, which the unsteered model reads for it and which count as no success;
    share_of: what strengths are shares of (see `Directions.lengths`). See `of` for whole prompt sets.
    """

    prompts: tuple[str, ...]
    harmful: tuple[bool, ...]
    judge: Judge = SCANS_JUDGE
    decoding: Decoding = Decoding(32)
    batch_size: int = 32
    kl_limit: float = 0.1
    max_drop: float = 0.05
    broken: BrokenJudge = BrokenJudge()
    share_of: str = "state"

    @classmethod
    def of(cls, sets: Sequence[PromptSet], **settings: Any) -> "Calibration":
        """The prompts of `sets` with these settings. Raises ValueError for a prompt without a label, and for none."""
        prompts, harmful = labelled(sets)
        return cls(tuple(prompts), tuple(harmful), **settings)


@dataclasses.dataclass(frozen=True)
class OpenChoice:
    """What is given of a choice; None is chosen. threshold_by: "outcome" (refusals under steering) or "roc"."""

    scored: LayerRange | None = None
    layers: LayerRange | None = None
    threshold: float | None = None
    strengths: tuple[float, ...] = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1)
    threshold_by: str = "outcome"

    def __post_init__(self) -> None:
        if self.threshold_by not in ("roc", "outcome"):
            raise ValueError(f"config.threshold_by {self.threshold_by!r} is not known; use 'outcome' or 'roc'")

    def settings(self, layers: int, vocabulary: Vocabulary | None = None) -> list[Setting]:
        """The settings to try on a model of so many layers, whose directions point to the words of `vocabulary`."""
        ranges = [self.layers] if self.layers else layer_candidates(layers, vocabulary)
        return [(each, strength) for each in ranges for strength in self.strengths]

    def pieces(self, prompts: int, layers: int, vocabulary: Vocabulary | None = None) -> int:
        """How much it takes to try them: answers, unsteered, toward refusal and away from it, and the same to read."""
        return 2 * prompts * (1 + 2 * len(self.settings(layers, vocabulary)))


@dataclasses.dataclass(frozen=True)
class Trial:
    """What the answers to the calibration prompts come to, None where that cannot be told.

    before: unsteered [n]; toward, away: steered toward refusal and away from it, by setting, [n] each. Which of the two
    a prompt gets is then a matter of the threshold alone. answers: the unsteered ones.
    """

    before: Outcomes
    toward: dict[Setting, Outcomes]
    away: dict[Setting, Outcomes]
    answers: Answers


def choose_classifier(
    cosines: np.ndarray, harmful: Sequence[bool], shortest: int | None = None
) -> tuple[LayerRange, float]:
    """The layers whose mean cosine tells harmful prompts best (AUROC), and the threshold there.

    `cosines` [n, L]. Every contiguous range of at least `shortest` layers (default: a quarter of them) is
    tried; of equally good ones the longest is taken. The threshold has the best balanced accuracy on the ROC.
    """
    L = cosines.shape[1]
    shortest = max(1, L // 4) if shortest is None else shortest
    ranges = [LayerRange(a, b) for a in range(L) for b in range(a + shortest, L + 1)]
    totals = np.concatenate([np.zeros((len(cosines), 1)), np.cumsum(cosines, axis=1)], axis=1)
    labels = np.asarray(harmful, bool)

    def scores(r: LayerRange) -> np.ndarray:
        return (totals[:, r.stop] - totals[:, r.first]) / len(r)

    # Rounded, since sums of equal areas differ in their last bits and would decide between equals.
    best = max(ranges, key=lambda r: (round(roc_auc_score(labels, scores(r)), 12), len(r)))
    return best, best_threshold(scores(best), labels.tolist())


def layer_candidates(layers: int, vocabulary: Vocabulary | None = None) -> list[LayerRange]:
    """Ranges to try: the third whose projection names refusal most often, the middle third, and the one behind it."""
    third = [(0, layers // 3), (layers // 3, 2 * layers // 3), (2 * layers // 3, layers)]
    ranges = [third[1], (layers // 2, 5 * layers // 6)]
    if vocabulary:
        named = [sum(token.refusal for token in segment.tokens) for segment in vocabulary.segments]
        if max(named) and third[int(np.argmax(named))] not in ranges:
            ranges.insert(0, third[int(np.argmax(named))])
    # A control vector cannot name block 0.
    return list(dict.fromkeys(LayerRange(max(1, first), end) for first, end in ranges if end > max(1, first)))


def toward(steering: Steering) -> Steering:
    """`steering` that takes every prompt for harmful."""
    return steering.replace(threshold=jnp.float32(-jnp.inf))  # type: ignore[attr-defined]


def away(steering: Steering) -> Steering:
    """`steering` that takes every prompt for safe."""
    return steering.replace(threshold=jnp.float32(jnp.inf))  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class InHand:
    """Work that goes on from an earlier run: the log of what is finished (None keeps nothing), and its progress."""

    log: Log | None = None
    done: Progress = silent


class Tried(NamedTuple):
    """What the answers to a prompt come to, by rule, and the tokens of the unsteered one."""

    outcomes: Outcomes
    tokens: list[int]


def try_strengths(
    model: ChatModel,
    directions: Directions,
    settings: Sequence[Setting],
    calibration: Calibration,
    hand: InHand = InHand(),
) -> Trial:
    """Answers the calibration prompts under each of `settings`, toward refusal and away from it, from one prefill."""
    whole, share_of = LayerRange(0, len(directions.norm)), calibration.share_of
    steerings = [steering_of(directions, Choice(whole, layers, 0.0, None, a, share_of)) for layers, a in settings]
    rules = [None, *(signed(steering) for steering in steerings for signed in (toward, away))]
    tried = _tried(model.steered(rules), calibration, hand)
    before, *both = (list(outcomes) for outcomes in zip(*(each.outcomes for each in tried), strict=True))
    return Trial(
        before,
        toward=dict(zip(settings, both[0::2], strict=True)),
        away=dict(zip(settings, both[1::2], strict=True)),
        answers=_answers([each.tokens for each in tried], calibration.decoding.max_new_tokens),
    )


def _tried(examinee: Steered, calibration: Calibration, hand: InHand) -> list[Tried]:
    """What comes of every prompt, which is two pieces of progress a rule: an answer, and the reading of it."""
    hand.done(2 * len(examinee.rules) * (0 if hand.log is None else len(hand.log.entries())))

    def make(left: list[int]) -> Iterator[tuple[list[int], list[Json]]]:
        prompts = [calibration.prompts[i] for i in left]
        how = calibration.decoding, calibration.batch_size, hand.done
        for rows, answers in examinee.answer_batches(prompts, *how):
            texts = [each.texts for each in answers]
            found = _outcomes(examinee.model, calibration, [prompts[row] for row in rows], texts, hand.done)
            by_prompt = zip(*found, strict=True)
            yield [left[row] for row in rows], [[list(o), t] for o, t in zip(by_prompt, answers[0].ids, strict=True)]

    return [Tried(*tried) for tried in by_batch(len(calibration.prompts), make, hand.log)]


def _outcomes(
    model: ChatModel, calibration: Calibration, prompts: Sequence[str], texts: Sequence[Sequence[str]], done: Progress
) -> list[Outcomes]:
    """What answers `texts` [rule][prompt] come to, read by `model`."""
    read = likelihoods(model, prompts, texts, calibration.batch_size, done)
    found = []
    for each, likely in zip(texts, read, strict=True):
        refused = calibration.judge.refused(prompts, each)
        broken = calibration.broken.broken(each, refused, [likelihood.mean for likelihood in likely])
        found.append([outcome(r, b) for r, b in zip(refused, broken, strict=True)])
    return found


def _answers(tokens: Sequence[Sequence[int]], width: int) -> Answers:
    rows = [[*ids, *[0] * (width - len(ids))] for ids in tokens]
    return Answers((), np.array(rows, np.int32), np.array(list(map(len, tokens)), np.int32))


def outcomes(trial: Trial, setting: Setting, scores: np.ndarray, threshold: float) -> Outcomes:
    """What answers come to under `setting` when prompts of `scores` [n] are told apart at `threshold`."""
    told = zip(trial.toward[setting], trial.away[setting], scores >= threshold, strict=True)
    return [t if harmful else a for t, a, harmful in told]


class Shares(NamedTuple):
    """Of the answers that can be told: to safe prompts, those that refuse and that comply; to harmful prompts, those
    that refuse; to all, broken ones."""

    safe_refused: float
    safe_complied: float
    harmful_refused: float
    broken: float

    @property
    def accuracy(self) -> float:
        """The balanced accuracy, to which a broken answer adds nothing."""
        return (self.safe_complied + self.harmful_refused) / 2


def shares(found: Sequence[Outcome | None], harmful: Sequence[bool]) -> Shares:
    """The shares among the outcomes `found` of prompts with these labels; 0 where there are none."""
    told = [(o, h) for o, h in zip(found, harmful, strict=True) if o is not None]

    def share(wanted: Outcome, *sides: bool) -> float:
        among = [o == wanted for o, h in told if h in sides]
        return sum(among) / max(1, len(among))

    return Shares(
        share("refused", False), share("complied", False), share("refused", True), share("broken", False, True)
    )


def best_outcome(trial: Trial, setting: Setting, scores: np.ndarray, harmful: Sequence[bool], max_drop: float) -> float:
    """The threshold whose outcome under `setting` has the best balanced accuracy.

    Only thresholds are taken that lower the refusal of harmful prompts by no more than `max_drop`; where none
    does, the one that lowers it least. Thresholds lie in the middle between neighbouring scores; of equally
    good ones the highest is taken, which steers the fewest prompts toward refusal.
    """
    levels = np.unique(scores)
    middles = np.concatenate([[levels[0] - 1e-3], (levels[:-1] + levels[1:]) / 2, [levels[-1] + 1e-3]])
    floor = shares(trial.before, harmful).harmful_refused - max_drop

    def merit(threshold: float) -> tuple[float, float, float]:
        found = shares(outcomes(trial, setting, scores, threshold), harmful)
        return (min(0.0, found.harmful_refused - floor), found.accuracy, threshold)

    return float(max(middles, key=merit))


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
    classifier: tuple[LayerRange, np.ndarray],
    settings: Sequence[Setting],
    calibration: Calibration,
    threshold: float | None = None,
    hand: InHand = InHand(),
) -> list[Candidate]:
    """Every setting as a candidate, each at its own best threshold or at the given one, the chosen one marked.

    `classifier` holds the layers that it averages over and its scores [n] of the prompts. The divergence is measured
    on up to one batch of the safe prompts that the model complies with, along its own answers. Raises ValueError where
    there is none, and as `choose_strength` does.
    """
    scored, scores = classifier
    prompts, harmful = calibration.prompts, calibration.harmful
    trial = try_strengths(model, directions, settings, calibration, hand)
    complied = [i for i, (o, h) in enumerate(zip(trial.before, harmful, strict=True)) if o == "complied" and not h]
    if not complied:
        raise ValueError("the model complies with no safe calibration prompt; the divergence of answers cannot be told")
    count = min(len(complied), calibration.batch_size)
    some = np.array(complied)[np.linspace(0, len(complied) - 1, count).astype(int)]
    choices = [
        Choice(
            scored,
            layers,
            best_outcome(trial, (layers, a), scores, harmful, calibration.max_drop) if threshold is None else threshold,
            alpha_rel=a,
            share_of=calibration.share_of,
        )
        for layers, a in settings
    ]
    steerings = [steering_of(directions, choice) for choice in choices]
    rows = model.rows([prompts[i] for i in some])
    answers = Answers((), trial.answers.tokens[some], trial.answers.lengths[some])
    nats = model.steered(steerings).divergences(rows, answers, calibration.batch_size)
    divergences = [float(total) / max(1, answers.written) for total in nats.sum(1)]
    candidates, lengths = [], directions.lengths(calibration.share_of)
    for setting, choice, kl in zip(settings, choices, divergences, strict=True):
        found = shares(outcomes(trial, setting, scores, choice.threshold), harmful)
        strength = setting[1] * float(lengths[setting[0].slice].mean())
        rates, allowed = (found.safe_refused, found.harmful_refused, found.accuracy), kl <= calibration.kl_limit
        candidates.append(Candidate(*setting, strength, choice.threshold, *rates, kl, allowed, False, found.broken))
    least = shares(trial.before, harmful).harmful_refused - calibration.max_drop
    best = choose_strength(candidates, calibration.kl_limit, least)
    return [dataclasses.replace(c, chosen=c is best) for c in candidates]


def choose_once(
    store: Store,
    model: ChatModel,
    directions: Directions,
    found: tuple[Reading, Vocabulary],
    given: OpenChoice,
    calibration: Calibration,
    done: Progress = silent,
) -> tuple[Choice, Strength, np.ndarray]:
    """What `given` leaves open, chosen on the calibration prompts; all candidates; and the classifier's scores [n].

    Kept in `store`, batch by batch while they are made; `done` is called with numbers of finished `OpenChoice.pieces`.
    """
    reading, vocabulary = found
    scored = given.scored or choose_classifier(reading.cosines, calibration.harmful)[0]
    scores = reading.cosines[:, scored.slice].mean(1)
    by_roc = given.threshold is None and given.threshold_by == "roc"
    threshold = best_threshold(scores, calibration.harmful) if by_roc else given.threshold
    settings = given.settings(model.config.layers, vocabulary)
    decoding = calibration.decoding

    def make() -> Json:
        hand = InHand(store.log("strength", follows), done)
        return plain(calibrate(model, directions, (scored, scores), settings, calibration, threshold, hand))

    follows = [
        model.fingerprint(),
        directions_identity(directions),
        data_sha256(model.rows(calibration.prompts)),
        [list(calibration.harmful), calibration.judge.name, calibration.judge.version, calibration.broken.version],
        [calibration.kl_limit, calibration.max_drop],
        [decoding.max_new_tokens, decoding.seed, calibration.batch_size],
        [[float(value) for value in dataclasses.astuple(decoding.sampling)], list(model.tokenizer.eos_ids)],
        plain([scored, settings, threshold, calibration.share_of]),
    ]
    candidates = from_json(store.once("strength", follows, make), tuple[Candidate, ...])
    store.drop("strength", follows, ".jsonl")
    best = next(candidate for candidate in candidates if candidate.chosen)
    choice = Choice(scored, best.layers, best.threshold, None, best.alpha_rel, calibration.share_of)
    strength = Strength(calibration.kl_limit, calibration.max_drop, len(calibration.prompts), candidates)
    return choice, strength, scores
