"""Rotary embeddings, what a query sees, and grouped-query attention over a cache.

Axes: B batch, T query position, S key position, N heads, K kv_heads, G = N // K, H head_dim, R turned features / 2
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsafe.model.blockwise import Scaling, blockwise, scores
from jaxsafe.model.config import Rope
from jaxsafe.model.products import matrix_products

DENSE = 512 * 512
"""Up to so many pairs of a query and a key the scores of a head exist all at once."""


def inverse_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " R"]:
    """Angle per position of each pair of features, float32.

    `linear` divides every frequency by `factor`; `llama3` (Llama 3.1) divides only the slow ones, those
    with fewer than `low_freq_factor` turns in the original context, and blends up to `high_freq_factor`;
    `yarn` (arXiv 2309.00071) blends along the pairs, between those with `beta_slow` and `beta_fast` turns; `longrope`
    (arXiv 2402.13753) divides each by its own of `divisors`; `none` turns nothing.
    """
    dim = rope.rotary_dim(head_dim)
    f: np.ndarray = 1.0 / (rope.theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)))
    if rope.kind == "linear":
        f = f / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_context * f / (2 * np.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        fast = np.clip((turns - low) / (high - low), 0, 1)
        f = f * (fast + (1 - fast) / rope.factor)
    elif rope.kind == "yarn":
        first, last = _yarn_range(rope, dim)
        slow = np.clip((np.arange(dim // 2, dtype=np.float32) - first) / (last - first), 0, 1)
        f = f * (1 - slow + slow / rope.factor)
    elif rope.kind == "longrope":
        f = f / np.asarray(rope.divisors, np.float32)
    elif rope.kind == "none":
        f = 0 * f
    return f.astype(np.float32)


def _yarn_range(rope: Rope, dim: int) -> tuple[float, float]:
    """The pairs, as real numbers, that make `beta_fast` and `beta_slow` turns in the original context."""

    def pair(turns: float) -> float:
        return dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    return first, last if last != first else first + 0.001


def rotation(
    rope: Rope, head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]:
    """cos and sin of every angle, float32."""
    rates = jnp.asarray(inverse_frequencies(rope, head_dim))
    angle = positions[..., None, None].astype(jnp.float32) * rates[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if rope.magnitude == 1 else (cos * rope.magnitude, sin * rope.magnitude)


def rotate(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T 1 R"], sin: Float[Array, "B T 1 R"]
) -> Float[Array, "B T heads H"]:
    """`x` turned in float32, features paired by halves as in Hugging Face checkpoints; those behind 2 R pass."""
    turned, rest = jnp.split(x, [2 * cos.shape[-1]], -1)
    a, b = jnp.split(turned.astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


def positions_of(valid: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Position of each token counted without padding; padding in front counts as 0."""
    return jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=-1) - 1, 0)


@flax.struct.dataclass
class Slots:
    """Where the tokens of a call are: what the model makes its positions and masks of.

    valid: which key slots hold a token, of all slots that the queries may see
    first: the slot of the first query, 0 without a cache

    A query sees the tokens up to its own slot. Positions count the tokens of a row, so a row's slots may have gaps.
    """

    valid: Bool[Array, "B S"]
    first: int | Int[Array, ""] = 0

    def queries(self, T: int) -> "Queries":
        """The `T` queries of the call and what they may see."""
        valid = jnp.asarray(self.valid)
        positions = positions_of(valid)
        return Queries(
            slots=self.first + jnp.arange(T, dtype=jnp.int32),
            positions=jax.lax.dynamic_slice_in_dim(positions, self.first, T, axis=1),
            valid=valid,
            key_positions=positions,
        )


@flax.struct.dataclass
class Queries:
    """The queries of a call and what they may see: their slots and positions, and those of the keys."""

    slots: Int[Array, " T"]
    positions: Int[Array, "B T"]
    valid: Bool[Array, "B S"]
    key_positions: Int[Array, "B S"]

    def mask(self, window: int | Int[Array, ""] | None) -> Bool[Array, "B T S"]:
        """Which key slots each query sees; of the `window` latest positions alone, its own among them."""
        seen = jnp.arange(self.valid.shape[1])[None, :] <= self.slots[:, None]
        mask = seen[None] & self.valid[:, None, :]
        if window is not None:
            mask &= self.key_positions[:, None, :] > self.positions[:, :, None] - window
        return mask

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B K S H"],
        v: Float[Array, "B K S H"],
        window: int | Int[Array, ""] | None,
        scaling: Scaling,
    ) -> Float[Array, "B T N*H"]:
        """See `attend`."""
        return attend(q, k, v, self, window, scaling)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    queries: Queries,
    window: int | Int[Array, ""] | None = None,
    scaling: Scaling | None = None,
) -> Float[Array, "B T N*H"]:
    """Grouped-query attention with a float32 softmax; 0 for padding, which sees no key.

    `scaling` None divides scores by the root of H.

    Short texts and single queries form their scores at once; long ones block by block, so that memory grows with
    T and S and not with their product; half-precision prompts on NVIDIA take cuDNN's kernel.
    """
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    usual = Scaling(H**-0.5)
    scaling = scaling or usual
    whole = T == S and window is None and scaling == usual
    if T > 1 and T * S > DENSE and whole and cudnn_serves(q.dtype, H):
        return fused(q, k, v, queries.valid, "cudnn").reshape(B, T, N * H)
    # Operands and results in the order of the matrix products, so that the compiler adds no transposes.
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    if T == 1 or T * S <= DENSE:
        heads = dense(grouped, k, v, queries.mask(window), scaling)
    else:
        heads = blockwise(grouped, k, v, queries, window, scaling)
    return heads.transpose(0, 3, 1, 2, 4).reshape(B, T, N * H)


def dense(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    scaling: Scaling,
) -> Float[Array, "B K G T H"]:
    """Attention whose scores exist all at once; 0 where a query sees no key."""
    seen = mask[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores(q, k, scaling), jnp.finfo(jnp.float32).min), axis=-1)
    heads = matrix_products(weights.astype(v.dtype).reshape(*v.shape[:2], -1, v.shape[2]), v).reshape(q.shape)
    return jnp.where(seen.any(-1, keepdims=True), heads, 0)


def cudnn_serves(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether the default device is an NVIDIA one whose cuDNN has attention for this dtype and size of a head."""
    if jax.default_backend() != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    major = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]
    return major.isdigit() and int(major) >= 8 and head_dim % 8 == 0 and head_dim <= 128


def fused(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    valid: Bool[Array, "B S"],
    implementation: Any,
) -> Float[Array, "B S N H"]:
    """Attention of every token to itself and those before it by `jax.nn.dot_product_attention`; 0 for padding.

    Kernels know lengths and no masks, so each row's tokens are moved to its front, and what they gave back again.
    """
    front = jnp.argsort(~valid, axis=1, stable=True)
    back = jnp.argsort(front, axis=1)
    lengths = jnp.maximum(valid.sum(1, dtype=jnp.int32), 1)
    heads = jax.nn.dot_product_attention(
        _moved(q, front, back),
        *(_moved(x.swapaxes(1, 2), front, back) for x in (k, v)),
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return jnp.where(valid[:, :, None, None], _moved(heads, back, front), 0)


@jax.custom_vjp
def _moved(x: Float[Array, "B S N H"], order: Int[Array, "B S"], back: Int[Array, "B S"]) -> Float[Array, "B S N H"]:
    """The tokens of each row in this `order`; `back` undoes it, of gradients without a scatter."""
    return jnp.take_along_axis(x, order[:, :, None, None], axis=1)


def _moved_forward(x: Array, order: Array, back: Array) -> tuple[Array, tuple[Array, Array]]:
    return _moved(x, order, back), (order, back)


def _moved_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    order, back = kept
    return _moved(gradient, back, order), None, None


_moved.defvjp(_moved_forward, _moved_backward)
