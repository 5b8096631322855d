"""Generation: one prefill, then a loop that stops when every row is done; one compiled program.

B batch, T prompt slots, S cache slots, V vocab
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsafe.kernels.forward import extended, prompt_inputs
from jaxsafe.kernels.likelihood import cross_entropy
from jaxsafe.kernels.sampling import Decoding, Drawing, drawing, next_token, penalise, row_seeds
from jaxsafe.model.attention import Slots
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Cache, Edits, Params, Transformer, variables
from jaxsafe.parallel import fetch
from jaxsafe.rows import Batch, Row

PAD = 0
"""The token in the slots behind an answer."""
WEIGHTS_IN_PLACE = {
    "xla_gpu_enable_dynamic_slice_fusion": True,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
}
"""A layer's weights are read where they lie in the stack of all layers: XLA's own choice for a GPU copies them first,
for each token, which takes longer than to multiply by them."""


@flax.struct.dataclass
class Generated:
    """Answers: their tokens, and how many each has before its end-of-text token.

    nats: float32 [B] the summed negative log-likelihood of these under the model that drew them, whatever was drawn by;
    None where that is not known
    """

    tokens: Int[Array, "B new"]
    lengths: Int[Array, " B"]
    nats: Float[Array, " B"] | None = None


@flax.struct.dataclass
class Prompted:
    """The state of a model that has read its prompts: logits of the next token, and a cache with room for answers."""

    logits: Float[Array, "B V"]
    cache: Cache


@flax.struct.dataclass
class Answering:
    """The state of the loop.

    step:  int32 [] how many tokens of each row are drawn
    token: int32 [B] the last one drawn, which the model has not read
    done:  bool [B] rows whose answer is finished
    seen:  bool [B, V] the tokens of each row's prompt and answer
    cache: keys and values of all that was read
    out:   int32 [B, new] the answers so far
    nats:  float32 [B] their summed negative log-likelihood
    """

    step: Int[Array, ""]
    token: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"]
    cache: Cache
    out: Int[Array, "B new"]
    nats: Float[Array, " B"]


def prefill(config: ModelConfig, params: Params, batch: Batch, edits: Any, new_slots: int) -> Prompted:
    """Reads the prompts; the cache has T + `new_slots` slots."""
    given = prompt_inputs(config, params, batch, new_slots, edits)
    logits: Any
    cache: Any
    logits, cache = Transformer(config).apply(variables(params, edits), *given, last=1)
    return Prompted(logits[:, -1], extended(cache, batch.tokens.shape[1] + new_slots))


def decode(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    prompted: Prompted,
    drawing: Drawing,
    edits: Any = None,
    axis_name: str | None = None,
) -> Generated:
    """Answers to the prompts of `batch`, which the model has read as `prompted` says.

    The cache has at least T + new_tokens - 1 slots. The loop ends when every row has drawn one of `drawing.eos`, those
    of all models of a mapped axis `axis_name` where there is one; a row of nothing but padding counts as done.
    """
    tokens, valid, new = batch.tokens, jnp.asarray(batch.valid), drawing.new_tokens
    B, T = tokens.shape
    filled = jnp.concatenate([valid, jnp.ones((B, prompted.cache.length - T), bool)], axis=1)
    rows = jnp.arange(B)
    penalty = jnp.asarray(drawing.sampling.repetition_penalty)
    collections = variables(params, edits)

    def drawn(state: Answering, logits: Float[Array, "B V"], cache: Cache) -> Answering:
        token = next_token(penalise(logits, state.seen, penalty), drawing.sampling, drawing.keys, state.step)
        token = jnp.where(state.done, PAD, token)
        done = state.done | jnp.isin(token, drawing.eos)
        return Answering(
            step=state.step + 1,
            token=token,
            done=done,
            seen=state.seen.at[rows, token].set(True),
            cache=cache,
            out=state.out.at[:, state.step].set(token),
            nats=state.nats + jnp.where(done, 0, cross_entropy(logits, token)),
        )

    def unfinished(state: Answering) -> Bool[Array, ""]:
        left = ~state.done.all()
        # One loop for all models: a loop that ends for each by itself would copy its cache at every step.
        return (state.step < new) & (left if axis_name is None else jax.lax.pmax(left, axis_name))

    def answer_on(state: Answering) -> Answering:
        slots = Slots(filled, T + state.step - 1)
        logits: Any
        cache: Any
        logits, cache = Transformer(config).apply(collections, state.token[:, None], slots, state.cache)
        return drawn(state, logits[:, -1], cache)

    start = Answering(
        step=jnp.int32(0),
        token=jnp.zeros(B, jnp.int32),
        done=~valid.any(-1),
        seen=jnp.zeros(prompted.logits.shape, bool).at[rows[:, None], tokens].max(valid),
        cache=prompted.cache,
        out=jnp.full((B, new), PAD, jnp.int32),
        nats=jnp.zeros(B, jnp.float32),
    )
    end = jax.lax.while_loop(unfinished, answer_on, drawn(start, prompted.logits, prompted.cache))
    ended = jnp.isin(end.out, drawing.eos) | (jnp.arange(new)[None] >= end.step) | ~valid.any(-1)[:, None]
    lengths = jnp.where(ended.any(-1), jnp.argmax(ended, -1), new)
    return Generated(end.out, lengths.astype(jnp.int32), end.nats)


@functools.partial(jax.jit, static_argnames=("config", "axis_name"))
def prefill_and_decode(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    drawing: Drawing,
    edits: Any = None,
    axis_name: str | None = None,
) -> Generated:
    """Answers to a batch of prompts, from arrays alone: the program that `generate` runs."""
    prompted = prefill(config, params, batch, edits, drawing.new_tokens - 1)
    return decode(config, params, batch, prompted, drawing, edits, axis_name)


def for_device(program: Any, *static: str) -> Any:
    """The jitted `program`, which decodes, compiled as the default device wants it; `static` names its arguments."""
    return _on_gpu(program, static) if jax.default_backend() == "gpu" else program


@functools.cache
def _on_gpu(program: Any, static: tuple[str, ...]) -> Any:
    return jax.jit(program.__wrapped__, static_argnames=static, compiler_options=WEIGHTS_IN_PLACE)


def generate(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    decoding: Decoding = Decoding(),
    edits: Edits = None,
    row_numbers: Any = None,
) -> Generated:
    """One answer to each row of a left-padded `batch`; `decoding.samples` is not read.

    `row_numbers` uint32 [B] make the rows' sampling keys; by default they follow from the rows' tokens (`row_seeds`).
    Sampling, seed, ends and edits may change without recompilation. Raises ValueError where the prompt and the new
    tokens exceed the model's context, and for a number of `decoding` out of range.
    """
    valid = fetch(batch.valid)
    longest, new = int(valid.sum(-1).max()), decoding.max_new_tokens
    if longest + new > config.context:
        raise ValueError(f"{longest} prompt tokens + {new} new ones exceed the model's context of {config.context}")
    if row_numbers is None:
        row_numbers = batch_numbers(fetch(batch.tokens), valid)
    program = for_device(prefill_and_decode, "config", "axis_name")
    return program(config, params, batch, drawing(decoding, row_numbers), edits)


def batch_numbers(tokens: Int[np.ndarray, "B T"], valid: Bool[np.ndarray, "B T"]) -> Int[np.ndarray, " B"]:
    """`row_seeds` of the rows of a batch; a row of nothing but padding counts as one of the token 0."""
    return row_seeds([Row(tuple(t[v].tolist()) or (0,), 0) for t, v in zip(tokens, valid, strict=True)])
