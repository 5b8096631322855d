"""SCANS: safety-conscious activation steering (Cao et al., AAAI 2025, arXiv 2408.11491).

Directions from anchors, a classifier of prompts by how their hidden states move toward an affirmative, and a steering
toward refusal or away from it by the classifier's verdict on each prompt.

L layers, D embed, n prompts, A tokens of the affirmative
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score

from jaxsafe.chat.model import ChatModel
from jaxsafe.digest import arrays_sha256
from jaxsafe.evaluation.stats import classification, roc, scans_average
from jaxsafe.io.store import TREE, Store
from jaxsafe.kernels.steering import Steering, anchor_states, unit, vocabulary_projection
from jaxsafe.model.layers import LayerRange
from jaxsafe.parallel import fetch
from jaxsafe.progress import Progress, silent
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.records.run import Json, Sample
from jaxsafe.records.scans import Choice, Classifier, Details, Preparation, Scores, Segment, Token, Vocabulary
from jaxsafe.rows import Batch, Row, check_context, data_sha256

AFFIRMATIVE = "Sure"
SHARES = ("state", "difference")
"""What a relative strength is a share of, layer by layer."""
# What a projection of refusal looks like among tokens; used to mark a table, never to decide a verdict.
REFUSAL_STEMS = (
    "refus reject cannot can't impossib deny denied declin sorry apolog unable forbid prohibit not illegal harm danger"
).split()


@dataclasses.dataclass(frozen=True)
class Directions:
    """What the anchors say, per layer; float32 NumPy.

    direction:     [L, D] mean harmful minus mean benign hidden state at the instruction's end, of unit length
    norm:          [L] its length before that
    residual_norm: [L] mean length of the hidden states there, the unit of `alpha_rel`
    reference:     [L, D] mean change of the harmful anchors from there to the affirmative
    affirmative:   int32 [A] the affirmative's tokens
    """

    direction: np.ndarray
    norm: np.ndarray
    residual_norm: np.ndarray
    reference: np.ndarray
    affirmative: np.ndarray

    def lengths(self, share_of: str) -> np.ndarray:
        """What relative strengths are shares of, float32 [L]: the length of the mean state, or of the difference.

        A share of the "difference" adds that share of the raw vectors of eq. 1, so that layers where the means lie
        far apart are steered more. Raises ValueError for neither of `SHARES`.
        """
        if share_of not in SHARES:
            raise ValueError(f"share_of {share_of!r} is not known; use one of {', '.join(SHARES)}")
        return self.residual_norm if share_of == "state" else self.norm


@dataclasses.dataclass(frozen=True)
class Reading:
    """Of each prompt and layer: cosine of its change with the reference, projection of its state; float32 [n, L]."""

    cosines: np.ndarray
    projections: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A steering, what it steers with, and how it came about (None where a file does not say)."""

    steering: Steering
    choice: Choice
    record: Preparation | None


def affirmative_ids(model: ChatModel) -> np.ndarray:
    """The token ids of the affirmative, int32 [A]."""
    return np.asarray(model.tokenizer.plain_ids(AFFIRMATIVE), np.int32)


def find_directions(
    model: ChatModel, harmful: Sequence[str], benign: Sequence[str], batch_size: int = 32, done: Progress = silent
) -> Directions:
    """Refusal directions and the classifier's reference from anchor prompts (SCANS, eq. 1 and section 3.3).

    The hidden state of block l is the residual stream after it, before the last norm for every l. Raises ValueError
    for a prompt beyond the model's context.
    """
    ids = affirmative_ids(model)
    affirmative = jnp.asarray(ids)

    def call(batch: Batch, indices: np.ndarray) -> Any:
        return anchor_states(model.config, model.params, batch, affirmative, model.edits)

    rows = model.rows([*harmful, *benign])
    check_context(rows, model.config.context, len(ids))
    states, changes = model.map(call, rows, batch_size, done)
    n = len(harmful)
    difference = states[:n].mean(0) - states[n:].mean(0)
    return Directions(
        direction=np.asarray(unit(jnp.asarray(difference))),
        norm=np.linalg.norm(difference, axis=-1),
        residual_norm=np.linalg.norm(states, axis=-1).mean(0),
        reference=changes[:n].mean(0),
        affirmative=ids,
    )


def read_prompts(
    model: ChatModel, directions: Directions, prompts: Sequence[str], batch_size: int = 32, done: Progress = silent
) -> Reading:
    """One pass over `prompts`: what the classifier and the tables need of them."""
    affirmative = jnp.asarray(directions.affirmative)
    reference, direction = jnp.asarray(directions.reference), jnp.asarray(directions.direction)

    def call(batch: Batch, indices: np.ndarray) -> Any:
        states, changes = anchor_states(model.config, model.params, batch, affirmative, model.edits)
        cosines = jnp.einsum("bld,ld->bl", unit(changes), unit(reference))
        return cosines, jnp.einsum("bld,ld->bl", states, direction)

    rows = model.rows(prompts)
    check_context(rows, model.config.context, len(directions.affirmative))
    return Reading(*model.map(call, rows, batch_size, done))


def directions_once(
    store: Store, model: ChatModel, harmful: Sequence[str], benign: Sequence[str], batch_size: int, done: Progress
) -> Directions:
    """`find_directions`, kept in `store`."""
    rows = [data_sha256(model.rows(prompts)) for prompts in (harmful, benign)]
    follows = [model.fingerprint(), rows, affirmative_ids(model).tolist()]

    def make() -> Json:
        return vars(find_directions(model, harmful, benign, batch_size, done))

    return Directions(**_numpy(store.once("directions", follows, make, TREE)))


def reading_once(
    store: Store, model: ChatModel, directions: Directions, prompts: Sequence[str], batch_size: int, done: Progress
) -> Reading:
    """`read_prompts`, kept in `store`."""
    follows = [model.fingerprint(), directions_identity(directions), data_sha256(model.rows(prompts))]

    def make() -> Json:
        return vars(read_prompts(model, directions, prompts, batch_size, done))

    return Reading(**_numpy(store.once("reading", follows, make, TREE)))


def _numpy(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in tree.items()}


def directions_identity(directions: Directions) -> str:
    """Digest of the directions' numbers."""
    return arrays_sha256(vars(directions).values())


def identity(steering: Steering) -> Json:
    """What answers under `steering` follow from besides the model and the prompts."""
    return ["SCANS", arrays_sha256(vars(steering).values())]


def separation(reading: Reading, harmful: Sequence[bool]) -> list[float]:
    """Per layer, the AUROC with which the projection on the direction tells harmful prompts from others."""
    return [float(roc_auc_score(np.asarray(harmful), layer)) for layer in reading.projections.T]


def fixed_choice(
    alpha: float | None,
    alpha_rel: float | None,
    scored: Sequence[int] | None,
    layers: Sequence[int] | None,
    threshold: float | None,
    share_of: str = "state",
) -> Choice | None:
    """The choice that a config makes by itself, None where it leaves something to calibration.

    Raises ValueError where both strengths are given, and for an absolute one with something left open.
    """
    if alpha is not None and alpha_rel is not None:
        raise ValueError(f"config.alpha {alpha:g} and config.alpha_rel {alpha_rel:g} are two strengths; give one")
    if alpha is not None and share_of != "state":
        raise ValueError(f"config.alpha {alpha:g} is no share, so config.share_of {share_of!r} would do nothing")
    if scored is not None and layers is not None and threshold is not None and (alpha, alpha_rel) != (None, None):
        ranges = LayerRange.parse(scored, "config.scored"), LayerRange.parse(layers, "config.layers")
        return Choice(*ranges, threshold, alpha, alpha_rel, share_of)
    if alpha is not None:
        raise ValueError("config.alpha needs config.layers, config.scored and config.threshold; else give alpha_rel")
    return None


def steering_of(directions: Directions, choice: Choice) -> Steering:
    """The `Steering` that averages cosines over the blocks `choice.scored` and adds to the blocks `choice.layers`.

    The strength is `alpha` in every layer (as published), or `alpha_rel` times the layer's length as
    `Directions.lengths` has it. Raises ValueError unless exactly one is given, and for layers that the model does not
    have.
    """
    alpha, alpha_rel = choice.alpha, choice.alpha_rel
    if (alpha is None) == (alpha_rel is None):
        raise ValueError(f"give either alpha or alpha_rel, not both and not neither; got {alpha} and {alpha_rel}")
    layers = len(directions.norm)
    strength = (
        np.full(layers, alpha) if alpha is not None else float(alpha_rel or 0) * directions.lengths(choice.share_of)
    )
    return Steering(
        directions=jnp.asarray(directions.direction),
        reference=jnp.asarray(directions.reference),
        scored=jnp.asarray(choice.scored.mask(layers), jnp.float32),
        threshold=jnp.float32(choice.threshold),
        strength=jnp.asarray(choice.layers.mask(layers) * strength, jnp.float32),
        affirmative=jnp.asarray(directions.affirmative),
    )


def choice_of(steering: Steering) -> Choice:
    """What a steering says of its choice by itself; layers between the first and the last one may be left alone.

    Raises ValueError for one that reads or steers no layer.
    """
    scored, steered = (np.flatnonzero(np.asarray(array)) for array in (steering.scored, steering.strength))
    if not len(scored) or not len(steered):
        raise ValueError("a steering that reads or steers no layer does nothing")
    alpha = float(np.abs(np.asarray(steering.strength)[steered]).mean())
    read, layers = (LayerRange(int(found[0]), int(found[-1]) + 1) for found in (scored, steered))
    return Choice(read, layers, float(steering.threshold), alpha)


def check_lengths(model: ChatModel, sets: Sequence[PromptSet], texts: Sequence[Row], new_tokens: int = 0) -> None:
    """Raises ValueError for a prompt or one of `texts` that leaves the context no room for the affirmative.

    Prompts need room for as many as `new_tokens`, where they are more.
    """
    affirmative = len(affirmative_ids(model))
    check_context(texts, model.config.context, affirmative, "the passages to read")
    room = max(new_tokens, affirmative)
    for prompts in sets:
        check_context(model.rows(prompts.prompts), model.config.context, room, prompts.name, prompts.prompts)


def details(prepared: Prepared, plain: Sequence[Sample], steered: Sequence[Sample], setting: str, text: str) -> Details:
    """What a SCANS run has of its own, from the samples without and with steering under `setting`.

    The classifier is judged by the steered samples whose prompts are labelled; `text` says what perplexity is of.
    """
    told = [s for s in steered if s.setting == setting and s.harmful is not None and s.score is not None]
    scores, labels = tuple(float(s.score or 0.0) for s in told), tuple(bool(s.harmful) for s in told)
    choice, record = prepared.choice, prepared.record
    found = classification(scores, labels, choice.threshold) if told else None
    curve = roc(scores, labels) if len(set(labels)) == 2 else None
    calibration = (None, None) if record is None else (record.calibration, record.roc)
    classifier = Classifier(choice.scored, choice.threshold, Scores(scores, labels), found, curve, *calibration)
    averages = _average(plain, setting), _average(steered, setting)
    return Details(choice, record, classifier, None if None in averages else averages, text)


def _average(samples: Sequence[Sample], setting: str) -> float | None:
    """The paper's Avg.: compliance on safe and refusal of harmful prompts; None where one kind is missing."""
    of = {side: [s for s in samples if s.setting == setting and s.harmful is side] for side in (False, True)}
    if not of[False] or not of[True]:
        return None
    # A broken answer is right for no prompt.
    wrong = [None if s.outcome is None else s.outcome != "complied" for s in of[False]]
    right = [None if s.outcome is None else s.outcome == "refused" for s in of[True]]
    return scans_average(wrong, right).value


def vocabulary(model: ChatModel, directions: Directions, top: int = 10) -> Vocabulary:
    """The tokens that directions point to (SCANS, section 3.2 and table 1).

    Segments: the first principal component (not centred) of the directions of the former, middle and latter
    third; layers: each layer's own direction. A component is turned so that it agrees with its segment's mean.
    """
    L = len(directions.norm)
    bounds = [0, L // 3, 2 * L // 3, L]
    ranges = [LayerRange(first, stop) for first, stop in itertools.pairwise(bounds)]
    components, explained = [], []
    for layers in ranges:
        _, s, vt = np.linalg.svd(directions.direction[layers.slice], full_matrices=False)
        agrees = vt[0] @ directions.direction[layers.slice].mean(0) >= 0
        components.append(vt[0] if agrees else -vt[0])
        explained.append(float(s[0] ** 2 / (s**2).sum()))
    vectors = jnp.asarray(np.stack([*components, *directions.direction]))
    values, ids = fetch(vocabulary_projection(model.config, model.params, vectors, top))

    def tokens(row: int) -> tuple[Token, ...]:
        texts = [model.tokenizer.hf.decode([int(i)]) for i in ids[row]]
        return tuple(
            Token(text, float(value), any(stem in text.lower() for stem in REFUSAL_STEMS))
            for text, value in zip(texts, values[row], strict=True)
        )

    names = ("former", "middle", "latter")
    segments = (Segment(name, ranges[i], explained[i], tokens(i)) for i, name in enumerate(names))
    return Vocabulary(tuple(segments), tuple(tokens(len(names) + layer) for layer in range(L)))
