"""Negative log-likelihood (nats): of single tokens, of the answers in a batch, of continuations of texts.

B batch, T slots, R last slots, D embed, V vocab
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxsafe.kernels.forward import final_states, prompt_inputs
from jaxsafe.kernels.sampling import most_likely
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params, unembed, unembedding
from jaxsafe.rows import Batch

BLOCK = 64
"""Of so many slots logits exist at a time."""


def cross_entropy(logits: Float[Array, "*n V"], target: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """Negative log-likelihood (nats) of each `target` token under its `logits`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, target)


@functools.partial(jax.jit, static_argnames=("config", "last", "block"))
def answer_nll(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    edits: Any = None,
    last: int | None = None,
    block: int = BLOCK,
) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """Summed negative log-likelihood (nats, float32) of each row's answer tokens, and their counts.

    `last` (static) is a number of final slots that holds every answer; only their logits are computed, those
    of `block` slots (static) at a time. A backward pass keeps what the products with weights gave.
    """
    states = final_states(config, params, prompt_inputs(config, params, batch, edits=edits), edits)
    return nll_after(config, params, batch, states, block, last)


def nll_after(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    states: Float[Array, "B R D"],
    block: int = BLOCK,
    last: int | None = None,
) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """What `answer_nll` returns, from the normed `states` of the last R slots, which predict every answer."""
    states = states if last is None else states[:, max(0, states.shape[1] - last - 1) :]
    first = batch.tokens.shape[1] - states.shape[1] + 1
    # A slot predicts the token of the next one, and the last slot nothing.
    target, counted = (jnp.pad(a[:, first:], [(0, 0), (0, 1)]) for a in (batch.tokens, batch.response))
    nll = token_nll(config, params, states, target, block)
    return jnp.sum(jnp.where(counted, nll, 0), axis=1), counted.sum(axis=1)


def token_nll(
    config: ModelConfig, params: Params, states: Float[Array, "B R D"], target: Int[Array, "B R"], block: int
) -> Float[Array, "B R"]:
    """Negative log-likelihood (nats, float32) of each `target` token after the normed `states`.

    At most [B, block, V] logits exist at a time, in the backward pass too.
    """
    head = unembedding(config, params)

    def some(states: Float[Array, "B r D"], target: Int[Array, "B r"]) -> Float[Array, "B r"]:
        return cross_entropy(unembed(config, states, head), target)

    return in_blocks(some, block, states, target)


def in_blocks(function: Callable[..., Float[Array, "B r"]], block: int, *arrays: Array) -> Float[Array, "B R"]:
    """`function` of `arrays` [B, R, ...], which maps each slot by itself, for `block` slots at a time.

    What it holds inside exists for one block, in the backward pass too.
    """
    B, R = arrays[0].shape[:2]

    def blocks(a: Array) -> Array:
        padded = jnp.pad(a, [(0, 0), (0, -R % block), *[(0, 0)] * (a.ndim - 2)])
        return padded.reshape(B, -1, block, *a.shape[2:]).swapaxes(0, 1)

    if block >= R:
        return function(*arrays)
    values = jax.lax.map(lambda part: jax.checkpoint(function)(*part), tuple(map(blocks, arrays)))
    return values.swapaxes(0, 1).reshape(B, -1)[:, :R]


@functools.partial(jax.jit, static_argnames=("config", "block"))
def likelihood(
    config: ModelConfig, params: Params, batch: Batch, final: Int[Array, " B"], block: int = 16, edits: Any = None
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Summed log-likelihood (nats, float32) of each row's continuation, and whether it is greedy.

    A continuation is what follows `instruction_end` in the left-padded `batch`, and then `final` int32 [B],
    the text's last token, which the model is not run on. It is greedy where each of its tokens is the most
    likely one. Logits exist for `block` slots at a time (static), [B, block, V], and for no block that precedes
    every continuation; neither the lengths of the continuations nor other parameters compile anew.
    """
    T = batch.tokens.shape[1]
    states = final_states(config, params, prompt_inputs(config, params, batch, edits=edits), edits)
    # Continuations begin behind the tokens that rows share, which were not run with them.
    states = jnp.pad(states, [(0, 0), (T - states.shape[1], 0), (0, 0)])
    targets = jnp.concatenate([batch.tokens[:, 1:], jnp.asarray(final)[:, None]], axis=1)
    scored = batch.valid & (jnp.arange(T)[None] >= batch.instruction_end[:, None])
    front = -T % block
    whole = jax.tree.map(
        lambda a: jnp.pad(a, [(0, 0), (front, 0), *[(0, 0)] * (a.ndim - 2)]), (states, targets, scored)
    )
    head = unembedding(config, params)

    def add(i: Int[Array, ""], so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        x, target, counts = (jax.lax.dynamic_slice_in_dim(a, i * block, block, axis=1) for a in whole)
        logits = unembed(config, x, head)
        hit = most_likely(logits) == target
        total, greedy = so_far
        nll = jnp.where(counts, cross_entropy(logits, target), 0)
        return total - nll.sum(axis=1), greedy & (hit | ~counts).all(axis=1)

    first = (front + jnp.min(jnp.where(batch.valid.any(axis=1), batch.instruction_end, T - 1))) // block
    nothing = jnp.zeros(len(batch.tokens), jnp.float32), jnp.ones(len(batch.tokens), bool)
    return jax.lax.fori_loop(first, (front + T) // block, add, nothing)
