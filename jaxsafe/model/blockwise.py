"""Attention in blocks of queries and keys, whose memory grows with the length of a text and not with its square.

The softmax is taken online: of each query the largest score, the sum and the weighted values so far are kept (Rabe
and Staats, arXiv 2112.05682; Dao et al., arXiv 2205.14135). The backward pass forms each block's scores again.

Axes: B batch, T query position, S key position, K kv_heads, G query heads that share one, H head_dim; n blocks of t
queries, s keys of a block
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QUERY_BLOCK, KEY_BLOCK = 256, 512


class Scaling(NamedTuple):
    """How products of queries and keys become scores: times `factor`, then c tanh(s / c) with `cap` c."""

    factor: float | Float[Array, ""]
    cap: float | Float[Array, ""] | None = None


class Sight(NamedTuple):
    """What the queries of a call see; the queries in blocks. `window` positions, all where it is None."""

    slots: Int[Array, "n t"]
    positions: Int[Array, "n B t"]
    valid: Bool[Array, "B S"]
    key_positions: Int[Array, "B S"]
    window: int | Int[Array, ""] | None
    scaling: Scaling


def scores(q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"], scaling: Scaling) -> Float[Array, "B K G T S"]:
    """The scaled products of queries and keys, float32."""
    s = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * scaling.factor
    return s if scaling.cap is None else scaling.cap * jnp.tanh(s / scaling.cap)


def blockwise(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    queries: Any,
    window: int | Int[Array, ""] | None,
    scaling: Scaling,
) -> Float[Array, "B K G T H"]:
    """Attention of `queries` (see `attention.Queries`), equal to that of all scores at once; 0 where no key is seen."""
    T = q.shape[3]
    t = min(QUERY_BLOCK, T)
    rest = -T % t

    def split(x: Array, axis: int, fill: int = 0) -> Array:
        widths = [(0, rest if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, t, *x.shape[axis + 1 :]), axis, 0)

    # A query that fills up the last block is in a slot before all keys.
    slots, positions = split(queries.slots, 0, -1), split(queries.positions, 1)
    sight = Sight(slots, positions, queries.valid, queries.key_positions, window, scaling)
    heads = jnp.moveaxis(_attention(split(q, 3), k, v, sight), 0, 3)
    return heads.reshape(*q.shape[:3], -1, q.shape[4])[:, :, :, :T]


def _key_blocks(slots: Int[Array, " t"], S: int) -> Int[Array, ""]:
    """How many blocks of keys a block of queries may see."""
    return jnp.minimum((jnp.max(slots) + KEY_BLOCK) // KEY_BLOCK, -(-S // KEY_BLOCK))


def _key_block(x: Array, j: Int[Array, ""], axis: int) -> Array:
    """Block `j` of the keys along `axis`; the last block reaches back, so that it is as long as the others."""
    size = min(KEY_BLOCK, x.shape[axis])
    return jax.lax.dynamic_slice_in_dim(x, jnp.minimum(j * KEY_BLOCK, x.shape[axis] - size), size, axis)


def _seen(
    sight: Sight, slots: Int[Array, " t"], positions: Int[Array, "B t"], j: Int[Array, ""]
) -> Bool[Array, "B 1 1 t s"]:
    """Which keys of block `j` the queries see, those that the block before holds left out."""
    key_slots = _key_block(jnp.arange(sight.valid.shape[1], dtype=jnp.int32), j, 0)
    before = key_slots[None, :] <= slots[:, None]
    seen = before[None] & (_key_block(sight.valid, j, 1) & (key_slots >= j * KEY_BLOCK)[None])[:, None, :]
    if sight.window is not None:
        seen &= _key_block(sight.key_positions, j, 1)[:, None, :] > positions[:, :, None] - sight.window
    return seen[:, None, None]


@jax.custom_vjp
def _attention(
    q: Float[Array, "n B K G t H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], sight: Sight
) -> Float[Array, "n B K G t H"]:
    return _forward(q, k, v, sight)[0]


def _forward(
    q: Float[Array, "n B K G t H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], sight: Sight
) -> tuple[Array, tuple]:
    """The heads, and what the backward pass needs: the operands, the heads and the logarithms of the sums."""

    def block(given: tuple) -> tuple[Array, Array]:
        q, slots, positions = given

        def add(j: Array, state: tuple) -> tuple:
            largest, total, values = state
            seen = _seen(sight, slots, positions, j)
            s = jnp.where(seen, scores(q, _key_block(k, j, 2), sight.scaling), jnp.finfo(jnp.float32).min)
            top = jnp.maximum(largest, s.max(-1, keepdims=True))
            weights = jnp.where(seen, jnp.exp(s - top), 0)
            shrink = jnp.exp(largest - top)
            added = jnp.einsum(
                "bkgts,bksh->bkgth", weights.astype(v.dtype), _key_block(v, j, 2), preferred_element_type=jnp.float32
            )
            return top, total * shrink + weights.sum(-1, keepdims=True), values * shrink + added

        zero = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
        start = (zero + jnp.finfo(jnp.float32).min, zero, jnp.zeros(q.shape, jnp.float32))
        largest, total, values = jax.lax.fori_loop(0, _key_blocks(slots, k.shape[2]), add, start)
        total = jnp.where(total > 0, total, 1)
        return (values / total).astype(v.dtype), largest + jnp.log(total)

    heads, log_sums = jax.lax.map(block, (q, sight.slots, sight.positions))
    return heads, (q, k, v, sight, heads, log_sums)


def _backward(kept: tuple, gradient: Float[Array, "n B K G t H"]) -> tuple:
    """The gradients with respect to queries, keys and values; those of keys and values add up in float32."""
    q, k, v, sight, heads, log_sums = kept
    along = jnp.sum(gradient.astype(jnp.float32) * heads.astype(jnp.float32), -1, keepdims=True)

    def block(sums: tuple[Array, Array], given: tuple) -> tuple[tuple[Array, Array], Array]:
        q, slots, positions, gradient, log_sums, along = given

        def add(j: Array, state: tuple) -> tuple:
            dq, dk, dv = state
            s, pull = jax.vjp(functools.partial(scores, scaling=sight.scaling), q, _key_block(k, j, 2))
            weights = jnp.where(_seen(sight, slots, positions, j), jnp.exp(s - log_sums), 0)
            of_weights = jnp.einsum(
                "bkgth,bksh->bkgts", gradient, _key_block(v, j, 2), preferred_element_type=jnp.float32
            )
            of_q, of_k = pull(weights * (of_weights - along))
            of_v = jnp.einsum(
                "bkgts,bkgth->bksh", weights.astype(v.dtype), gradient, preferred_element_type=jnp.float32
            )
            return dq + of_q.astype(jnp.float32), _add_block(dk, of_k, j), _add_block(dv, of_v, j)

        start = (jnp.zeros(q.shape, jnp.float32), *sums)
        dq, dk, dv = jax.lax.fori_loop(0, _key_blocks(slots, k.shape[2]), add, start)
        return (dk, dv), dq.astype(q.dtype)

    start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    blocks = (q, sight.slots, sight.positions, gradient, log_sums, along)
    (dk, dv), dq = jax.lax.scan(block, start, blocks)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


def _add_block(total: Array, part: Array, j: Int[Array, ""]) -> Array:
    """`total` [B, K, S, H] with `part` [B, K, s, H] added to block `j` of its slots."""
    at = jnp.minimum(j * KEY_BLOCK, total.shape[2] - part.shape[2])
    old = jax.lax.dynamic_slice_in_dim(total, at, part.shape[2], 2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part.astype(total.dtype), at, 2)


_attention.defvjp(_forward, _backward)
