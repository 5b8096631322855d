"""Safety-conscious activation steering (SCANS, arXiv 2408.11491): directions, classifier, steered generation.

B batch, T prompt slots, L layers, D embed, A tokens of the affirmative answer, R last slots run again
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxsafe.kernels.generate import Generated, decode, extend
from jaxsafe.kernels.sampling import Sampling
from jaxsafe.model.attention import causal_mask, positions_of
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import At, at, collection, edit, readings
from jaxsafe.model.transformer import Cache, Params, Transformer, unembed, unembedding, variables
from jaxsafe.text.batches import Batch


@flax.struct.dataclass
class Steering:
    """What SCANS needs to classify and to steer; arrays only, so that another value is no other program.

    directions: float32 [L, D] unit refusal directions v
    reference:  float32 [L, D] mean change of the harmful anchors from the instruction's end to the affirmative
    scored:     float32 [L] 1 for the layers whose cosines are averaged
    threshold:  float32 [] a prompt is harmful when its score is at least this
    strength:   float32 [L] what is added along v, in units of the residual stream; 0 leaves a layer alone
    """

    directions: jax.Array
    reference: jax.Array
    scored: jax.Array
    threshold: jax.Array
    strength: jax.Array


def unit(x: jax.Array) -> jax.Array:
    """`x` [..., D] divided by its length; zero stays zero."""
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(length > 0, length, 1)


def cosine_score(change: jax.Array, reference: jax.Array, scored: jax.Array) -> jax.Array:
    """Mean over the scored layers of cos(change, reference), float32 [B] (SCANS, eq. 4 and 5).

    `change` [L, B, D], `reference` [L, D], `scored` [L]. A zero vector has cosine 0.
    """
    cosine = jnp.einsum("lbd,ld->lb", unit(change.astype(jnp.float32)), unit(reference))
    return jnp.einsum("lb,l->b", cosine, scored) / jnp.maximum(scored.sum(), 1)


def steering_edit(steering: Steering, gate: jax.Array, start: jax.Array) -> dict[str, Any]:
    """The edit of SCANS: +strength * v where `gate` [B] is +1, -strength * v where it is -1, from `start` [B] on."""
    add = steering.strength[:, None] * steering.directions
    return {"resid": edit(add=add, gate=gate, start=start)}


def start_positions(batch: Batch) -> jax.Array:
    """The position (counted without padding) of each row's instruction end, int32 [B]."""
    return jnp.take_along_axis(positions_of(batch.valid), batch.instruction_end[:, None], axis=1)[:, 0]


def prefill_and_change(
    config: ModelConfig, params: Params, batch: Batch, affirmative: jax.Array, slots: int
) -> tuple[Cache, jax.Array, jax.Array]:
    """One unsteered pass over the prompt, then one over the affirmative behind its instruction end.

    `affirmative` int32 [A]. Returns a cache of T + `slots` slots (`slots` >= A) whose first T hold the
    prompt; the residual stream at the instruction end, [L, B, D]; and its change a = h(end) - h(affirmative),
    [L, B, D] (SCANS, section 3.3). The slots behind the prompt are free: what decoding sees of them it has
    written before.
    """
    B, T = batch.tokens.shape
    A = affirmative.shape[0]
    model = Transformer(config)
    positions = positions_of(batch.valid)

    def run(tokens: Any, positions: Any, mask: Any, cache: Any, slot: Any, read: jax.Array) -> tuple:
        collections = variables(params) | {"reducers": collection({"resid": At(read)}, "reduce")}
        options: dict[str, Any] = {"capture_intermediates": at("resid"), "mutable": ["intermediates"]}
        (_, kv), state = model.apply(collections, tokens, positions, mask, cache, slot, last=0, **options)
        return kv, readings(state["intermediates"])["resid"][:, :, 0]

    mask = causal_mask(jnp.arange(T), batch.valid, config.window)
    kv, at_end = run(batch.tokens, positions, mask, None, 0, batch.instruction_end[:, None])
    cache = extend(kv, slots)

    # The affirmative follows the instruction end; tokens that a row has behind it (a begun answer) are not seen.
    prompt = batch.valid & (jnp.arange(T)[None] <= batch.instruction_end[:, None])
    seen = jnp.concatenate([prompt, jnp.ones((B, slots), bool)], axis=1)
    offset = start_positions(batch)[:, None] + 1 + jnp.arange(A)[None]
    mask = _window_by_position(causal_mask(T + jnp.arange(A), seen, None), seen, offset, config.window)
    tokens = jnp.broadcast_to(affirmative[None], (B, A))
    cache, at_affirmative = run(tokens, offset, mask, cache, jnp.int32(T), jnp.full((B, 1), A - 1))
    return cache, at_end, at_end.astype(jnp.float32) - at_affirmative.astype(jnp.float32)


def _window_by_position(mask: jax.Array, seen: jax.Array, queries: jax.Array, window: int | None) -> jax.Array:
    """Narrows `mask` to a sliding window where a row's slots have a gap, so that slots are no measure of distance."""
    if window is None:
        return mask
    return mask & (positions_of(seen)[:, None, :] > queries[:, :, None] - window)


@functools.partial(jax.jit, static_argnames=("config",))
def anchor_states(
    config: ModelConfig, params: Params, batch: Batch, affirmative: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Residual stream at the instruction end and its change to the affirmative, each float32 [B, L, D]."""
    _, h, change = prefill_and_change(config, params, batch, affirmative, affirmative.shape[0])
    return h.swapaxes(0, 1).astype(jnp.float32), change.swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames=("config", "new_tokens", "again", "pad"))
def scans_generate(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    affirmative: jax.Array,
    steering: Steering,
    sampling: Sampling,
    keys: jax.Array,
    eos: jax.Array,
    new_tokens: int,
    again: int = 1,
    pad: int = 0,
) -> tuple[Generated, jax.Array]:
    """Classifies each row, steers it by its own sign and answers; one prefill serves both.

    Positions before a row's instruction end are never steered, so their keys and values are those of the
    unsteered prompt. Only the last `again` slots, which must reach back to every row's instruction end, are
    run again under the edit. Returns the answers and the scores float32 [B].
    """
    T = batch.tokens.shape[1]
    slots = max(new_tokens - 1, affirmative.shape[0])
    cache, _, change = prefill_and_change(config, params, batch, affirmative, slots)
    score = cosine_score(change, steering.reference, steering.scored)
    gate = jnp.where(score >= steering.threshold, 1.0, -1.0)
    edits = steering_edit(steering, gate, start_positions(batch))

    filled = jnp.concatenate([batch.valid, jnp.ones((batch.tokens.shape[0], slots), bool)], axis=1)
    logits, cache = Transformer(config).apply(
        variables(params, edits),
        batch.tokens[:, T - again :],
        positions_of(batch.valid)[:, T - again :],
        causal_mask(jnp.arange(T - again, T), filled, config.window),
        cache,
        T - again,
        last=1,
    )
    answers = decode(
        config, params, logits[:, -1], cache, batch.tokens, batch.valid, edits, sampling, keys, eos, new_tokens, pad
    )
    return answers, score


def vocabulary_projection(config: ModelConfig, params: Params, vectors: jax.Array, top: int) -> tuple[Any, Any]:
    """The `top` tokens whose unembeddings point most along each of `vectors` [M, D]: scores and ids, [M, top].

    (SCANS, section 3.2; the logit lens without the last norm's scale.)
    """
    scores = unembed(vectors.astype(config.dtype), unembedding(config, params), config.tied)
    return jax.lax.top_k(scores, top)
