"""Safety-conscious activation steering (SCANS, arXiv 2408.11491): directions, classifier, steered generation.

B batch, T prompt slots, L layers, D embed, A tokens of the affirmative answer, R last slots run again
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxsafe.kernels.generate import Generated, decode
from jaxsafe.kernels.prompt import extended, final_states, prompt_inputs
from jaxsafe.kernels.sampling import Sampling
from jaxsafe.kernels.training import nll_after
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


@flax.struct.dataclass
class Prefilled:
    """One unsteered pass over a batch of prompts: its cache, and each row's cosines float32 [B, L]."""

    cache: Cache
    cosines: jax.Array


def unit(x: jax.Array) -> jax.Array:
    """`x` [..., D] divided by its length; zero stays zero."""
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(length > 0, length, 1)


def layer_cosines(change: jax.Array, reference: jax.Array) -> jax.Array:
    """cos(change, reference) at every layer, float32 [B, L], of `change` [L, B, D] and `reference` [L, D].

    (SCANS, section 3.3.) A zero vector has cosine 0.
    """
    return jnp.einsum("lbd,ld->bl", unit(change.astype(jnp.float32)), unit(reference))


def score(cosines: jax.Array, scored: jax.Array) -> jax.Array:
    """Mean of `cosines` [B, L] over the layers where `scored` [L] is 1, float32 [B] (SCANS, section 3.3)."""
    return jnp.einsum("bl,l->b", cosines, scored) / jnp.maximum(scored.sum(), 1)


def gates(cosines: jax.Array, steering: Steering) -> jax.Array:
    """+1 (toward refusal) for rows whose score reaches the threshold, -1 for the others, float32 [B]."""
    return jnp.where(score(cosines, steering.scored) >= steering.threshold, 1.0, -1.0)


def steering_edit(steering: Steering, gate: jax.Array, start: jax.Array) -> dict[str, Any]:
    """The edit of SCANS: gate * strength * v from position `start` [B] on, with `gate` [B] of +1 and -1."""
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

    def run(tokens: Any, positions: Any, mask: Any, cache: Any, slot: Any, read: jax.Array) -> tuple:
        collections = variables(params) | {"reducers": collection({"resid": At(read)}, "reduce")}
        options: dict[str, Any] = {"capture_intermediates": at("resid"), "mutable": ["intermediates"]}
        (_, kv), state = model.apply(collections, tokens, positions, mask, cache, slot, last=0, **options)
        return kv, readings(state["intermediates"])["resid"][:, :, 0]

    given = prompt_inputs(config, params, batch, slots)
    kv, at_end = run(*given, read=batch.instruction_end[:, None] - batch.shared)
    cache = extended(kv, T + slots)

    # The affirmative follows the instruction end; tokens that a row has behind it (a begun answer) are not seen.
    prompt = batch.valid & (jnp.arange(T)[None] <= batch.instruction_end[:, None])
    seen = jnp.concatenate([prompt, jnp.ones((B, slots), bool)], axis=1)
    offset = start_positions(batch)[:, None] + 1 + jnp.arange(A)[None]
    mask = _window_by_position(causal_mask(T + jnp.arange(A), seen, None), seen, offset, config.window)
    tokens = jnp.broadcast_to(affirmative[None], (B, A))
    cache, at_affirmative = run(tokens, offset, mask, cache, jnp.int32(T), read=jnp.full((B, 1), A - 1))
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


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def scans_prefill(
    config: ModelConfig, params: Params, batch: Batch, affirmative: jax.Array, reference: jax.Array, slots: int
) -> Prefilled:
    """Runs the prompts once, unsteered, for classification and for every answer that follows."""
    cache, _, change = prefill_and_change(config, params, batch, affirmative, slots)
    return Prefilled(cache, layer_cosines(change, reference))


def rerun_slots(batch: Batch) -> int:
    """How many last slots reach back to every row's instruction end."""
    return int(batch.tokens.shape[1] - np.asarray(batch.instruction_end).min())


def chunk_inputs(
    config: ModelConfig, batch: Batch, cache: Cache, tokens: jax.Array, again: int
) -> tuple[jax.Array, jax.Array, jax.Array, Cache, int]:
    """What the model is given to run the prompts' last `again` slots again, and the `tokens` [B, X] behind them."""
    B, T = batch.tokens.shape
    X = tokens.shape[1]
    filled = jnp.concatenate([batch.valid, jnp.ones((B, cache.length - T), bool)], axis=1)
    return (
        jnp.concatenate([batch.tokens[:, T - again :], tokens], axis=1),
        positions_of(filled)[:, T - again : T + X],
        causal_mask(jnp.arange(T - again, T + X), filled, config.window),
        cache,
        T - again,
    )


def steered_chunk(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    cache: Cache,
    tokens: jax.Array,
    edits: Any,
    again: int,
    last: int,
) -> tuple[jax.Array, Cache]:
    """Logits [B, last, V] of the prompts' last `again` slots and the `tokens` [B, X] behind them, under `edits`."""
    given = chunk_inputs(config, batch, cache, tokens, again)
    out: Any = Transformer(config).apply(variables(params, edits), *given, last=last)
    return out


@functools.partial(jax.jit, static_argnames=("config", "new_tokens", "again", "pad"))
def scans_answer(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    prefilled: Prefilled,
    steering: Steering,
    sampling: Sampling,
    keys: jax.Array,
    eos: jax.Array,
    new_tokens: int,
    again: int = 1,
    pad: int = 0,
) -> Generated:
    """Answers from a finished prefill, each row steered by its own sign; zero strength answers unsteered.

    Positions before a row's instruction end are never steered, so their keys and values are those of the
    unsteered prompt. Only the last `again` slots, which must reach back to every row's instruction end, are
    run again under the edit.
    """
    edits = steering_edit(steering, gates(prefilled.cosines, steering), start_positions(batch))
    none = batch.tokens[:, :0]
    logits, cache = steered_chunk(config, params, batch, prefilled.cache, none, edits, again, 1)
    return decode(
        config, params, logits[:, -1], cache, batch.tokens, batch.valid, edits, sampling, keys, eos, new_tokens, pad
    )


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
    """Classifies, steers and answers every row in one program with one prefill: answers and scores float32 [B]."""
    slots = max(new_tokens - 1, affirmative.shape[0])
    prefilled = scans_prefill(config, params, batch, affirmative, steering.reference, slots)
    answers = scans_answer(config, params, batch, prefilled, steering, sampling, keys, eos, new_tokens, again, pad)
    return answers, score(prefilled.cosines, steering.scored)


@functools.partial(jax.jit, static_argnames=("config", "again"))
def answer_divergence(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    prefilled: Prefilled,
    steering: Steering,
    answers: Generated,
    again: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """KL(unsteered || steered) of the next-token distributions along given answers.

    Returns its sum over the tokens of each row's answer (nats), float32 [B], and their number, int32 [B].
    `prefilled` needs as many free slots as the answers have tokens.
    """
    N = answers.tokens.shape[1]
    start = start_positions(batch)

    def log_probabilities(gate: jax.Array) -> jax.Array:
        edits = steering_edit(steering, gate, start)
        chunk = (batch, prefilled.cache, answers.tokens[:, :-1], edits, again, N)
        return jax.nn.log_softmax(steered_chunk(config, params, *chunk)[0])

    gate = gates(prefilled.cosines, steering)
    before, after = log_probabilities(jnp.zeros_like(gate)), log_probabilities(gate)
    kl = jnp.sum(jnp.exp(before) * (before - after), axis=-1)
    counted = jnp.arange(N)[None] < answers.lengths[:, None]
    return jnp.sum(jnp.where(counted, kl, 0), axis=1), answers.lengths


@functools.partial(jax.jit, static_argnames=("config", "again", "block"))
def steered_nll(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    prefilled: Prefilled,
    steering: Steering,
    again: int,
    block: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Summed negative log-likelihood (nats) of each row's steered answer, float32 [B], and its tokens, int32 [B].

    The rows of `batch`, prefilled as they are, hold their answers behind the instruction end, to which the last
    `again` slots (static) reach back. Logits of `block` slots (static) exist at a time.
    """
    edits = steering_edit(steering, gates(prefilled.cosines, steering), start_positions(batch))
    given = chunk_inputs(config, batch, prefilled.cache, batch.tokens[:, :0], again)
    return nll_after(config, params, batch, final_states(config, params, given, edits), block)


def vocabulary_projection(config: ModelConfig, params: Params, vectors: jax.Array, top: int) -> tuple[Any, Any]:
    """The `top` tokens whose unembeddings point most along each of `vectors` [M, D]: scores and ids, [M, top].

    (SCANS, section 3.2; the logit lens without the last norm's scale.)
    """
    scores = unembed(vectors.astype(config.dtype), unembedding(config, params), config.tied)
    return jax.lax.top_k(scores, top)
