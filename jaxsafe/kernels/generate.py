"""Generation: one prefill, then a loop that stops when every row is done; one compiled program.

B batch, T prompt slots, S cache slots, V vocab
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsafe.kernels.prompt import extended, prompt_inputs
from jaxsafe.kernels.sampling import Sampling, check_sampling, next_token, penalise, row_seeds
from jaxsafe.model.attention import causal_mask, positions_of
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import Edit
from jaxsafe.model.transformer import Cache, Params, Transformer, variables
from jaxsafe.parallel import fetch, put_rows
from jaxsafe.text.batches import Batch, Row, map_batches
from jaxsafe.text.chat import check_context


@flax.struct.dataclass
class Generated:
    """Answers: `tokens` int32 [B, new], `lengths` int32 [B], the tokens before the end-of-text token."""

    tokens: Any
    lengths: Any


def prefill(config: ModelConfig, params: Params, batch: Batch, edits: Any, new_slots: int) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after the prompt and a cache of T + `new_slots` slots that holds it."""
    given = prompt_inputs(config, params, batch, new_slots, edits)
    logits: Any
    cache: Any
    logits, cache = Transformer(config).apply(variables(params, edits), *given, last=1)
    return logits[:, -1], extended(cache, batch.tokens.shape[1] + new_slots)


def decode(
    config: ModelConfig,
    params: Params,
    logits: jax.Array,
    cache: Cache,
    tokens: jax.Array,
    valid: jax.Array,
    edits: Any,
    sampling: Sampling,
    keys: jax.Array,
    eos: jax.Array,
    new_tokens: int,
    pad: int = 0,
) -> Generated:
    """Up to `new_tokens` tokens from the `logits` [B, V] that follow a prompt of T slots.

    `cache` has at least T + new_tokens - 1 slots; `keys` [B] are the rows' sampling keys; `eos` int32 [E].
    The loop ends when every row has met an `eos`; a row of nothing but padding counts as done.
    """
    B, T = tokens.shape
    S = cache.length
    filled = jnp.concatenate([valid, jnp.ones((B, S - T), bool)], axis=1)
    positions = positions_of(filled)
    rows = jnp.arange(B)
    seen = jnp.zeros((B, logits.shape[-1]), bool).at[rows[:, None], tokens].max(valid)
    collections = variables(params, edits)

    def draw(logits: jax.Array, seen: jax.Array, done: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = next_token(penalise(logits, seen, jnp.asarray(sampling.repetition_penalty)), sampling, keys, step)
        return jnp.where(done, pad, token), seen.at[rows, token].set(True)

    def go_on(state: tuple) -> jax.Array:
        step, _, done, *_ = state
        return (step < new_tokens) & ~done.all()

    def body(state: tuple) -> tuple:
        step, token, done, seen, cache, out = state
        slot = T + step - 1
        logits, cache = Transformer(config).apply(
            collections,
            token[:, None],
            jax.lax.dynamic_slice_in_dim(positions, slot, 1, axis=1),
            causal_mask(slot[None], filled, config.window),
            cache,
            slot,
        )
        token, seen = draw(logits[:, -1], seen, done, step)
        return step + 1, token, done | jnp.isin(token, eos), seen, cache, out.at[:, step].set(token)

    done = ~valid.any(-1)
    token, seen = draw(logits, seen, done, jnp.int32(0))
    out = jnp.full((B, new_tokens), pad, jnp.int32).at[:, 0].set(token)
    state = (jnp.int32(1), token, done | jnp.isin(token, eos), seen, cache, out)
    steps, _, _, _, _, out = jax.lax.while_loop(go_on, body, state)
    ended = jnp.isin(out, eos) | (jnp.arange(new_tokens)[None] >= steps) | ~valid.any(-1)[:, None]
    lengths = jnp.where(ended.any(-1), jnp.argmax(ended, -1), new_tokens)
    return Generated(out, lengths.astype(jnp.int32))


@functools.partial(jax.jit, static_argnames=("config", "new_tokens", "pad"))
def _generate(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    edits: Any,
    sampling: Sampling,
    keys: jax.Array,
    eos: jax.Array,
    new_tokens: int,
    pad: int,
) -> Generated:
    logits, cache = prefill(config, params, batch, edits, new_tokens - 1)
    return decode(config, params, logits, cache, batch.tokens, batch.valid, edits, sampling, keys, eos, new_tokens, pad)


def sampling_keys(seed: int, seeds: Any) -> jax.Array:
    """One key a row, from the run's `seed` and the rows' own numbers [B]."""
    return jax.vmap(lambda s: jax.random.fold_in(jax.random.key(seed), s))(jnp.asarray(seeds, jnp.uint32))


def generate(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    max_new_tokens: int = 64,
    edits: Mapping[str, Edit] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    eos: Sequence[int] = (),
    seed: int = 0,
    row_numbers: Any = None,
    pad: int = 0,
) -> Generated:
    """Answers to a left-padded `batch`: tokens int32 [B, max_new_tokens] and lengths int32 [B].

    Greedy at `temperature` 0. `eos` are the ids that end an answer. `row_numbers` uint32 [B] make the rows'
    sampling keys; by default they follow from the rows' tokens (`row_seeds`). Temperature, edits and every
    other number may change without recompilation. Raises ValueError where the prompt and the new tokens
    exceed the model's context, and for a sampling number out of range.
    """
    valid = fetch(batch.valid)
    longest = int(valid.sum(-1).max())
    if longest + max_new_tokens > config.context:
        raise ValueError(
            f"{longest} prompt tokens + {max_new_tokens} new ones exceed the model's context of {config.context}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1")
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    check_sampling(sampling)
    if row_numbers is None:
        tokens = fetch(batch.tokens)
        row_numbers = row_seeds([Row(tuple(t[v].tolist()) or (0,), 0) for t, v in zip(tokens, valid, strict=True)])
    keys = sampling_keys(seed, row_numbers)
    eos_ids = jnp.asarray(eos_array(eos))
    return _generate(config, params, batch, edits, as_arrays(sampling), keys, eos_ids, max_new_tokens, pad)


def as_arrays(sampling: Sampling) -> Sampling:
    """`sampling` with typed arrays in place of Python numbers, so that an int and a float share one program."""
    return Sampling(
        jnp.asarray(sampling.temperature, jnp.float32),
        jnp.asarray(sampling.top_k, jnp.int32),
        jnp.asarray(sampling.top_p, jnp.float32),
        jnp.asarray(sampling.repetition_penalty, jnp.float32),
    )


def eos_array(eos: Sequence[int]) -> np.ndarray:
    """`eos` as int32 [E], never empty: -1 is no token."""
    return np.array(sorted(set(eos)) or [-1], np.int32)


def generate_rows(
    config: ModelConfig,
    params: Params,
    rows: Sequence[Row],
    batch_size: int = 32,
    max_new_tokens: int = 64,
    n: int = 1,
    mesh: Mesh | None = None,
    done: Callable[[int], None] = lambda count: None,
    seed: int = 0,
    **options: Any,
) -> Generated:
    """Answers to `rows` in batches formed by length: tokens [n_rows * n, new], `n` samples of a row together.

    `options` are those of `generate`. A batch that does not fit memory is halved and tried again; `done`
    hears how many rows each finished batch had.
    """
    check_context(rows, config.context, max_new_tokens)
    many = [row for row in rows for _ in range(n)]
    numbers = row_seeds(many)

    def call(batch: Batch, indices: np.ndarray) -> Generated:
        batch = put_rows(batch, mesh)
        return generate(config, params, batch, max_new_tokens, seed=seed, row_numbers=numbers[indices], **options)

    multiple = 1 if mesh is None else mesh.shape["data"]
    return map_batches(call, many, batch_size, multiple, done)
