"""Rotary embeddings, masks and grouped-query attention over a cache.

B batch, T query position, S key position, N heads, K kv_heads, G = N // K, H head_dim
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsafe.model.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per position of each pair of features, float32 [H / 2].

    `linear` divides every frequency by `factor`; `llama3` (Llama 3.1) divides only the slow ones, those
    with fewer than `low_freq_factor` turns in the original context, and blends up to `high_freq_factor`.
    """
    f = 1.0 / (rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)))
    if rope.kind == "linear":
        f = f / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_context * f / (2 * np.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        fast = np.clip((turns - low) / (high - low), 0, 1)
        f = f * (fast + (1 - fast) / rope.factor)
    return f.astype(np.float32)


def rotation(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every angle, float32 [B, T, 1, H / 2], for `positions` int32 [B, T]."""
    angle = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`x` [B, T, heads, H] turned in float32, features paired by halves as in Hugging Face checkpoints."""
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def positions_of(valid: jax.Array) -> jax.Array:
    """Position of each token counted without padding, int32 [B, T]; padding in front counts as 0."""
    return jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=-1) - 1, 0)


def causal_mask(query_slots: jax.Array, valid: jax.Array, window: int | None) -> jax.Array:
    """Which key slots each query slot sees, bool [B, T, S].

    `query_slots` int32 [T]; `valid` bool [B, S] over the slots of the keys; with `window` W a query sees
    the W latest keys, itself among them. Slots of one row are contiguous, so distance in slots is distance
    in positions.
    """
    slots = jnp.arange(valid.shape[1])
    seen = slots[None, :] <= query_slots[:, None]
    if window is not None:
        seen &= slots[None, :] > query_slots[:, None] - window
    return seen[None] & valid[:, None, :].astype(bool)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention with a float32 softmax; finite where a query sees no key.

    q [B, T, N, H]; k, v [B, K, S, H]; mask bool [B, T, S]. Returns [B, T, N * H].
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    # Operands and results in the order of the matrix products, so that the compiler adds no transposes.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * H**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    heads = jnp.einsum("bkgts,bksh->bkgth", weights, v)
    return heads.transpose(0, 3, 1, 2, 4).reshape(B, T, N * H)
