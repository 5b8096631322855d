"""Log-likelihood of the continuations of texts.

B batch, T slots, D embed, V vocab
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxsafe.kernels.prompt import final_states, prompt_inputs
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params, unembed, unembedding
from jaxsafe.text.batches import Batch


@functools.partial(jax.jit, static_argnames=("config", "block"))
def likelihood(
    config: ModelConfig, params: Params, batch: Batch, final: Any, block: int = 16
) -> tuple[jax.Array, jax.Array]:
    """Summed log-likelihood (nats) of each row's continuation, float32 [B], and whether it is greedy, bool [B].

    A continuation is what stands behind `instruction_end` in the left-padded `batch` and then `final` int32 [B],
    the text's last token, which the model is not run on. It is greedy where each of its tokens is the most
    likely one. Logits exist for `block` slots at a time (static), [B, block, V], and for no block that precedes
    every continuation; neither the lengths of the continuations nor other parameters compile anew.
    """
    T = batch.tokens.shape[1]
    states = final_states(config, params, prompt_inputs(config, params, batch))
    states = jnp.pad(states, [(0, 0), (batch.shared, 0), (0, 0)])  # continuations begin behind what rows share
    targets = jnp.concatenate([batch.tokens[:, 1:], jnp.asarray(final)[:, None]], axis=1)
    scored = batch.valid & (jnp.arange(T) >= batch.instruction_end[:, None])
    front = -T % block
    whole = jax.tree.map(
        lambda a: jnp.pad(a, [(0, 0), (front, 0), *[(0, 0)] * (a.ndim - 2)]), (states, targets, scored)
    )
    head = unembedding(config, params)

    def add(i: jax.Array, so_far: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, target, counts = (jax.lax.dynamic_slice_in_dim(a, i * block, block, axis=1) for a in whole)
        logits = unembed(x, head, config.tied)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        log_p = chosen - jax.nn.logsumexp(logits, axis=-1)
        hit = jnp.argmax(logits, axis=-1) == target
        total, greedy = so_far
        return total + jnp.where(counts, log_p, 0).sum(axis=1), greedy & (hit | ~counts).all(axis=1)

    first = (front + jnp.min(jnp.where(batch.valid.any(axis=1), batch.instruction_end, T - 1))) // block
    nothing = jnp.zeros(len(batch.tokens), jnp.float32), jnp.ones(len(batch.tokens), bool)
    return jax.lax.fori_loop(first, (front + T) // block, add, nothing)
