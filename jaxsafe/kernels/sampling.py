"""The next token from logits: greedy, or sampled with a key of each row's own.

B batch, V vocab, E tokens that end an answer
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxsafe.rows import Row


@flax.struct.dataclass
class Sampling:
    """How tokens are drawn; numbers, so that no value recompiles. Each is a scalar or has shape [B].

    temperature:        0 is greedy
    top_k:              keep the k most likely tokens; 0 keeps all
    top_p:              then keep the fewest tokens whose probabilities reach p; 1 keeps all
    repetition_penalty: logits of tokens already in the row are divided by it where positive, else multiplied
    """

    temperature: jax.Array | float = 0.0
    top_k: jax.Array | int = 0
    top_p: jax.Array | float = 1.0
    repetition_penalty: jax.Array | float = 1.0


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How prompts are answered: up to `max_new_tokens` tokens, greedy unless `sampling` says otherwise.

    Each prompt has `samples` answers, drawn by `seed`; the ids `eos` end one. Of these only `max_new_tokens` is part
    of a program's shape.
    """

    max_new_tokens: int = 64
    sampling: Sampling = Sampling()
    seed: int = 0
    samples: int = 1
    eos: tuple[int, ...] = ()


@flax.struct.dataclass
class Drawing:
    """What a program draws the tokens of a batch by; arrays, so that other numbers are no other program.

    sampling:   its fields as arrays, each a scalar or [B]
    keys:       [B] the rows' random keys
    eos:        int32 [E] the ids that end an answer
    new_tokens: how many tokens are drawn at most (part of the shape, no array)
    """

    sampling: Sampling
    keys: Key[Array, " B"]
    eos: Int[Array, " E"]
    new_tokens: int = flax.struct.field(pytree_node=False)


def drawing(decoding: Decoding, row_numbers: Any) -> Drawing:
    """The `Drawing` of `decoding` for rows of these numbers, uint32 [B], of which their random keys are made.

    Raises ValueError for a number out of its range.
    """
    if decoding.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {decoding.max_new_tokens} must be at least 1")
    check_sampling(decoding.sampling)
    eos = jnp.asarray(eos_array(decoding.eos))
    keys = sampling_keys(decoding.seed, row_numbers)
    return Drawing(as_arrays(decoding.sampling), keys, eos, decoding.max_new_tokens)


def as_arrays(sampling: Sampling) -> Sampling:
    """`sampling` with typed arrays in place of Python numbers, so that an int and a float share one program."""
    return Sampling(
        jnp.asarray(sampling.temperature, jnp.float32),
        jnp.asarray(sampling.top_k, jnp.int32),
        jnp.asarray(sampling.top_p, jnp.float32),
        jnp.asarray(sampling.repetition_penalty, jnp.float32),
    )


def sampling_keys(seed: int, row_numbers: Any) -> Key[Array, " B"]:
    """One key a row, from the run's `seed` and the rows' own numbers [B]."""
    return jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(jnp.asarray(row_numbers, jnp.uint32))


def eos_array(eos: Sequence[int]) -> Int[np.ndarray, " E"]:
    """`eos` as int32 [E], never empty: -1 is no token."""
    return np.array(sorted(set(eos)) or [-1], np.int32)


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError for a number outside its range."""
    if np.any(np.asarray(sampling.temperature) < 0):
        raise ValueError(f"temperature {sampling.temperature} is negative; use 0 for greedy or a positive number")
    if np.any(np.asarray(sampling.top_k) < 0):
        raise ValueError(f"top_k {sampling.top_k} is negative; use 0 to keep every token")
    if np.any(np.asarray(sampling.top_p) <= 0) or np.any(np.asarray(sampling.top_p) > 1):
        raise ValueError(f"top_p {sampling.top_p} is not in (0, 1]")
    if np.any(np.asarray(sampling.repetition_penalty) <= 0):
        raise ValueError(f"repetition_penalty {sampling.repetition_penalty} is not positive; 1 means none")


def row_seeds(rows: Sequence[Row]) -> Int[np.ndarray, " n"]:
    """A number for each row, uint32, from its tokens and how often they occurred before.

    Sampling keys made of it depend neither on a row's neighbours nor on its place.
    """
    seen: dict[int, int] = {}
    out = []
    for row in rows:
        digest = zlib.crc32(np.asarray(row.ids, np.int32).tobytes())
        seen[digest] = seen.get(digest, -1) + 1
        out.append(zlib.crc32(np.asarray([seen[digest]], np.int32).tobytes(), digest) if seen[digest] else digest)
    return np.array(out, np.uint32)


def penalise(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "..."]
) -> Float[Array, "B V"]:
    """The repetition penalty of CTRL (arXiv 1909.05858, section 4.1) on the logits of tokens that were `seen`.

    `penalty` is a scalar or [B].
    """
    penalty = jnp.broadcast_to(jnp.asarray(penalty, logits.dtype), logits.shape[:1])[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likely(logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """`logits` with every token but the top-k, and of these the top-p nucleus, set to -inf."""
    V = logits.shape[-1]
    order = jnp.argsort(-logits, axis=-1, stable=True)
    rank = jnp.arange(V)[None]
    k = jnp.where(top_k > 0, top_k, V)[:, None]
    likely = jnp.where(rank < k, jnp.take_along_axis(logits, order, -1), -jnp.inf)
    p = jax.nn.softmax(likely, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    kept = jnp.where((rank < k) & ((before < top_p[:, None]) | (rank == 0)), likely, -jnp.inf)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), -1)


def most_likely(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """The first of the largest entries, as `argmax`, in two passes: one over pairs of entry and index is no vector's.

    The last one where no entry is a number.
    """
    V = logits.shape[-1]
    largest = logits == logits.max(axis=-1, keepdims=True)
    return jnp.minimum(jnp.where(largest, jnp.arange(V, dtype=jnp.int32), V).min(axis=-1), V - 1)


def next_token(
    logits: Float[Array, "B V"], sampling: Sampling, keys: Key[Array, " B"], step: Int[Array, ""]
) -> Int[Array, " B"]:
    """The token drawn from the float32 `logits` of each row, by its key folded with `step`.

    The sorts and the noise of sampling are computed only where some row asks for them.
    """
    B = logits.shape[0]
    temperature, top_k, top_p = (
        jnp.broadcast_to(jnp.asarray(value, dtype), (B,))
        for value, dtype in (
            (sampling.temperature, jnp.float32),
            (sampling.top_k, jnp.int32),
            (sampling.top_p, jnp.float32),
        )
    )
    greedy = most_likely(logits)

    def sample() -> Int[Array, " B"]:
        scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
        scaled = jax.lax.cond(
            jnp.any((top_k > 0) | (top_p < 1)), lambda x: keep_likely(x, top_k, top_p), lambda x: x, scaled
        )
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[1:]))(keys)
        return jnp.where(temperature > 0, most_likely(scaled + noise), greedy)

    return jax.lax.cond(jnp.any(temperature > 0), sample, lambda: greedy)
