"""SCANS: safety-conscious activation steering (Cao et al., AAAI 2025, arXiv 2408.11491).

Directions from anchors, a classifier of prompts by how their hidden states move toward an affirmative, and
answers steered toward refusal or away from it by the classifier's verdict on each prompt.

B batch, L layers, D embed, n prompts
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score

from jaxsafe.io.chat_model import ChatModel
from jaxsafe.kernels.generate import Generated, as_arrays, eos_array, sampling_keys
from jaxsafe.kernels.sampling import Sampling, check_sampling, row_seeds
from jaxsafe.kernels.steering import (
    Steering,
    anchor_states,
    rerun_slots,
    scans_answer,
    scans_prefill,
    score,
    unit,
    vocabulary_projection,
)
from jaxsafe.parallel import fetch, put_rows
from jaxsafe.text.batches import Batch, Row, map_batches
from jaxsafe.text.chat import check_context

AFFIRMATIVE = "Sure"
# What a projection of refusal looks like among tokens; used to mark a table, never to decide a verdict.
REFUSAL_STEMS = (
    "refus reject cannot can't impossib deny denied declin sorry apolog unable forbid prohibit not illegal harm danger"
).split()

Progress = Callable[[int], None]


def silent(n: int) -> None:
    """A `Progress` that tells nobody."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are decoded: greedy by default, up to `max_new_tokens`, in batches of at most `batch_size`."""

    max_new_tokens: int = 64
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    batch_size: int = 32


@dataclasses.dataclass(frozen=True)
class Directions:
    """What the anchors tell, per layer; float32 NumPy.

    direction:     [L, D] mean harmful minus mean benign hidden state at the instruction's end, of unit length
    norm:          [L] its length before that
    residual_norm: [L] mean length of the hidden states there, the unit of `alpha_rel`
    reference:     [L, D] mean change of the harmful anchors from there to the affirmative
    """

    direction: np.ndarray
    norm: np.ndarray
    residual_norm: np.ndarray
    reference: np.ndarray


@flax.struct.dataclass
class Reading:
    """Of each prompt and layer: cosine of its change with the reference, projection of its state; [n, L]."""

    cosines: Any
    projections: Any


@flax.struct.dataclass
class Answers:
    """The scores [n] of prompts, and their answers without and with steering."""

    scores: Any
    before: Generated
    after: Generated


def affirmative_ids(model: ChatModel) -> jnp.ndarray:
    """The token ids of the affirmative, int32 [A]."""
    return jnp.asarray(model.tokenizer.plain_ids(AFFIRMATIVE), jnp.int32)


def find_directions(
    model: ChatModel, harmful: Sequence[str], benign: Sequence[str], batch_size: int = 32, done: Progress = silent
) -> Directions:
    """Refusal directions and the classifier's reference from anchor prompts (SCANS, eq. 1 and section 3.3).

    The hidden state of block l is the residual stream after it, before the last norm for every l.
    """
    affirmative = affirmative_ids(model)

    def call(batch: Batch, indices: np.ndarray) -> Any:
        return anchor_states(model.config, model.params, put_rows(batch, model.mesh), affirmative)

    rows = model.rows([*harmful, *benign])
    check_context(rows, model.config.context, len(affirmative))
    states, changes = map_batches(call, rows, batch_size, model.row_multiple, done)
    n = len(harmful)
    difference = states[:n].mean(0) - states[n:].mean(0)
    return Directions(
        direction=np.asarray(unit(difference)),
        norm=np.linalg.norm(difference, axis=-1),
        residual_norm=np.linalg.norm(states, axis=-1).mean(0),
        reference=changes[:n].mean(0),
    )


def read_prompts(
    model: ChatModel, directions: Directions, prompts: Sequence[str], batch_size: int = 32, done: Progress = silent
) -> Reading:
    """One pass over `prompts`: what the classifier and the tables need of them."""
    affirmative = affirmative_ids(model)
    reference, direction = jnp.asarray(directions.reference), jnp.asarray(directions.direction)

    def call(batch: Batch, indices: np.ndarray) -> Reading:
        states, changes = anchor_states(model.config, model.params, put_rows(batch, model.mesh), affirmative)
        return Reading(
            cosines=jnp.einsum("bld,ld->bl", unit(changes), unit(reference)),
            projections=jnp.einsum("bld,ld->bl", states, direction),
        )

    rows = model.rows(prompts)
    check_context(rows, model.config.context, len(affirmative))
    return map_batches(call, rows, batch_size, model.row_multiple, done)


def separation(reading: Reading, harmful: Sequence[bool]) -> list[float]:
    """Per layer, the AUROC with which the projection on the direction tells harmful prompts from others."""
    return [float(roc_auc_score(np.asarray(harmful), layer)) for layer in np.asarray(reading.projections).T]


def steering_of(
    directions: Directions,
    scored: tuple[int, int],
    threshold: float,
    steered: tuple[int, int],
    alpha: float | None = None,
    alpha_rel: float | None = None,
) -> Steering:
    """The `Steering` that averages cosines over blocks `scored` and adds to blocks `steered`, both [first, end).

    The strength is `alpha` in every layer (as published), or `alpha_rel` times the mean length of the
    residual stream of each layer. Raises ValueError unless exactly one is given, and for an empty range.
    """
    if (alpha is None) == (alpha_rel is None):
        raise ValueError(f"give either alpha or alpha_rel, not both and not neither; got {alpha} and {alpha_rel}")
    layers = len(directions.norm)
    for name, (first, end) in {"scored": scored, "steered": steered}.items():
        if not 0 <= first < end <= layers:
            raise ValueError(f"{name} layers [{first}, {end}) do not lie within the model's {layers} layers")
    strength = np.full(layers, alpha) if alpha is not None else float(alpha_rel or 0) * directions.residual_norm
    return Steering(
        directions=jnp.asarray(directions.direction),
        reference=jnp.asarray(directions.reference),
        scored=jnp.asarray(layer_mask(layers, scored)),
        threshold=jnp.float32(threshold),
        strength=jnp.asarray(layer_mask(layers, steered) * strength, jnp.float32),
    )


def layer_mask(layers: int, range_: tuple[int, int]) -> np.ndarray:
    """1.0 for layers in [first, end), else 0.0; float32 [layers]."""
    index = np.arange(layers)
    return ((index >= range_[0]) & (index < range_[1])).astype(np.float32)


def unsteered(steering: Steering) -> Steering:
    """`steering` with no strength: the same programs then answer as the model itself does."""
    return steering.replace(strength=jnp.zeros_like(steering.strength))  # type: ignore[attr-defined]


def answer_both(
    model: ChatModel,
    steering: Steering,
    rows: Sequence[Row],
    decoding: Decoding,
    done: Callable[[np.ndarray, Answers], None] = lambda indices, answers: None,
) -> Answers:
    """Answers to `rows` without and with steering, both from one prefill.

    `done(indices, answers)` hears of every finished batch, so that a long run can be kept.
    """
    check_sampling(decoding.sampling)
    check_context(rows, model.config.context, decoding.max_new_tokens)
    numbers = row_seeds(rows)
    affirmative, eos = affirmative_ids(model), jnp.asarray(eos_array(model.tokenizer.eos_ids))
    slots = max(decoding.max_new_tokens, len(affirmative))
    sampling = as_arrays(decoding.sampling)
    off = unsteered(steering)

    def call(batch: Batch, indices: np.ndarray) -> Answers:
        again = rerun_slots(batch)
        batch = put_rows(batch, model.mesh)
        start = (model.config, model.params, batch)
        prefilled = scans_prefill(*start, affirmative, steering.reference, slots)
        keys = sampling_keys(decoding.seed, numbers[indices])
        rest = (sampling, keys, eos, decoding.max_new_tokens, again)
        answers = Answers(
            scores=score(prefilled.cosines, steering.scored),
            before=scans_answer(*start, prefilled, off, *rest),
            after=scans_answer(*start, prefilled, steering, *rest),
        )
        done(indices, answers)
        return answers

    return map_batches(call, rows, decoding.batch_size, model.row_multiple)


def vocabulary(model: ChatModel, directions: Directions, top: int = 10) -> dict[str, Any]:
    """The tokens that directions point to (SCANS, section 3.2 and table 1).

    "segments": the first principal component (not centred) of the directions of the former, middle and latter
    third; "layers": each layer's own direction. A component is turned so that it agrees with its segment's mean.
    """
    L = len(directions.norm)
    bounds = [0, L // 3, 2 * L // 3, L]
    components, explained = [], []
    for first, end in itertools.pairwise(bounds):
        _, s, vt = np.linalg.svd(directions.direction[first:end], full_matrices=False)
        agrees = vt[0] @ directions.direction[first:end].mean(0) >= 0
        components.append(vt[0] if agrees else -vt[0])
        explained.append(float(s[0] ** 2 / (s**2).sum()))
    vectors = jnp.asarray(np.stack([*components, *directions.direction]))
    values, ids = fetch(vocabulary_projection(model.config, model.params, vectors, top))

    def tokens(row: int) -> list[dict[str, Any]]:
        texts = [model.tokenizer.hf.decode([int(i)]) for i in ids[row]]
        return [
            {"token": text, "score": float(value), "refusal": any(s in text.lower() for s in REFUSAL_STEMS)}
            for text, value in zip(texts, values[row], strict=True)
        ]

    names = ("former", "middle", "latter")
    return {
        "segments": [
            {
                "name": names[i],
                "layers": [bounds[i], bounds[i + 1] - 1],
                "explained_variance": explained[i],
                "tokens": tokens(i),
            }
            for i in range(3)
        ],
        "layers": [{"layer": layer, "tokens": tokens(3 + layer)} for layer in range(L)],
    }
