"""Running a batch of prompts: tokens that all rows begin with, such as a system prompt, are run once for all of them.

B batch, T prompt slots, S cache slots, P tokens that all rows begin with, L layers, D embed, K kv_heads, H head_dim
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsafe.model.attention import causal_mask, positions_of
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import FINAL, at, readings
from jaxsafe.model.transformer import Cache, Params, Transformer, variables
from jaxsafe.text.batches import Batch

Given = tuple[jax.Array, jax.Array, jax.Array, Cache | None, int]


def prompt_inputs(config: ModelConfig, params: Params, batch: Batch, slots: int = 0, edits: Any = None) -> Given:
    """What `Transformer` is given to run the prompts: tokens, positions, mask, cache, slot.

    Where `batch.shared` is P > 0 these are the T - P last slots, behind a cache of T + `slots` slots that holds the
    first P tokens of every row; a shorter row's slots among them hold some of these tokens again. The numbers are
    those of the whole prompts. Where there are `edits`, which may differ from row to row, nothing is shared.
    """
    T, P = batch.tokens.shape[1], batch.shared
    positions = positions_of(batch.valid)
    if edits or not P:
        return batch.tokens, positions, causal_mask(jnp.arange(T), batch.valid, config.window), None, 0
    filled = jnp.pad(batch.valid, [(0, 0), (0, slots)])
    mask = causal_mask(jnp.arange(P, T), filled, config.window)
    return batch.tokens[:, P:], positions[:, P:], mask, _shared_cache(config, params, batch, T + slots), P


def _shared_cache(config: ModelConfig, params: Params, batch: Batch, slots: int) -> Cache:
    """A cache of `slots` slots whose first P hold what of the shared tokens falls among them, by row."""
    P = batch.shared
    first = batch.tokens.shape[1] - batch.valid.sum(-1)  # the slot of each row's first token
    tokens = jax.lax.dynamic_slice_in_dim(batch.tokens[0], first[0], P)[None]
    mask = causal_mask(jnp.arange(P), jnp.ones((1, P), bool), config.window)
    _, once = Transformer(config).apply(variables(params), tokens, jnp.arange(P)[None], mask, last=0)
    source = jnp.maximum(jnp.arange(P)[None] - first[:, None], 0)  # [B, P]; slots before the first are not seen

    def spread(a: jax.Array) -> jax.Array:  # [L, 1, K, P, H] -> [L, B, K, P, H]
        return jnp.moveaxis(a[:, 0][:, :, source], 2, 1)

    return extended(jax.tree.map(spread, once), slots)


def extended(cache: Cache, slots: int) -> Cache:
    """`cache` with empty slots behind, `slots` in all."""
    return jax.tree.map(lambda a: jnp.pad(a, [(0, 0)] * 3 + [(0, slots - a.shape[3]), (0, 0)]), cache)


def final_states(
    config: ModelConfig, params: Params, given: Given, edits: Any = None, keeps: str = "products"
) -> jax.Array:
    """The normed states [B, R, D] that the unembedding reads, of the R slots of `given`.

    A backward pass keeps of every layer what `keeps` (static) says (see `KEEPS` of the transformer).
    """
    options: dict[str, Any] = {"last": 0, "capture_intermediates": at(FINAL), "mutable": ["intermediates"]}
    _, state = Transformer(config, keeps).apply(variables(params, edits), *given, **options)
    return readings(state["intermediates"])[FINAL]
