"""Answers whose tokens are drawn from the logits of two models, or of one model under two prompts.

The token that is drawn goes behind both. One model under two prompts runs both in one pass of 2B rows.

B batch, T prompt slots, V vocab
"""

import functools
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafe.kernels.forward import extended
from jaxsafe.kernels.generate import PAD, Generated
from jaxsafe.kernels.sampling import Drawing, next_token, penalise
from jaxsafe.model.attention import Slots
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Cache, Params, Transformer, variables
from jaxsafe.rows import Batch


class Contrast(Protocol):
    """How two logits become one: a pytree of arrays."""

    def __call__(
        self, main: Float[Array, "B V"], other: Float[Array, "B V"], step: Int[Array, ""]
    ) -> Float[Array, "B V"]:
        """Logits of the token of number `step` of the answers."""


@flax.struct.dataclass
class Difference(Contrast):
    """main - strength (main - other): Self-CD (arXiv 2401.17633), main being the model under a prompt for safety."""

    strength: Float[Array, ""]

    def __call__(
        self, main: Float[Array, "B V"], other: Float[Array, "B V"], step: Int[Array, ""]
    ) -> Float[Array, "B V"]:
        """The same at every step."""
        return main - self.strength * (main - other)


@flax.struct.dataclass
class Expert(Contrast):
    """SafeDecoding (arXiv 2402.08983): the first `tokens` tokens lean toward an expert, the others are the model's.

    Candidates are the tokens in both lists of the most likely ones, as long as it takes for `common` of them to be in
    both; each has the probability p + strength (p_expert - p), at least 1e-8.
    """

    strength: Float[Array, ""]
    tokens: Int[Array, ""]
    common: Int[Array, ""]

    def __call__(
        self, main: Float[Array, "B V"], other: Float[Array, "B V"], step: Int[Array, ""]
    ) -> Float[Array, "B V"]:
        """Those of the model from step `tokens` on."""

        def leaning() -> Float[Array, "B V"]:
            p, expert = jax.nn.softmax(main), jax.nn.softmax(other)
            # A token is in both lists of k tokens where the worse of its two ranks is below k.
            worse = jnp.maximum(_ranks(main), _ranks(other))
            last = jnp.take(jnp.sort(worse, axis=-1), self.common - 1, axis=-1)
            score = jnp.maximum(p + self.strength * (expert - p), 1e-8)
            return jnp.where(worse <= last[:, None], jnp.log(score), -jnp.inf)

        return jax.lax.cond(step < self.tokens, leaning, lambda: main)


def _ranks(logits: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """The place of each token in the list of the most likely ones, 0 for the first."""
    return jnp.argsort(jnp.argsort(-logits, axis=-1, stable=True), axis=-1)


@flax.struct.dataclass
class Both:
    """The state of the loop: as `generate.Answering`, with one cache for each model."""

    step: Int[Array, ""]
    token: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"]
    caches: tuple[Cache, ...]
    out: Int[Array, "B new"]


@functools.partial(jax.jit, static_argnames="config")
def contrasted_answers(
    config: ModelConfig, params: tuple[Params, ...], batch: Batch, contrast: Any, drawing: Drawing
) -> Generated:
    """An answer to each of B prompts, which stand in `batch` twice: as the main model reads them, then as the other.

    `params` are those of both models, or of the one that is both; the edits of a `ChatModel` are not applied.
    """
    B, T = batch.tokens.shape[0] // 2, batch.tokens.shape[1]
    new, model = drawing.new_tokens, Transformer(config)
    valid = jnp.asarray(batch.valid)
    filled = jnp.concatenate([valid, jnp.ones((2 * B, new - 1), bool)], axis=1)
    parts = [slice(0, 2 * B)] if len(params) == 1 else [slice(0, B), slice(B, 2 * B)]

    def run(tokens: Int[Array, "2B X"], slots: list[Slots], caches: Any) -> tuple[Any, tuple[Cache, ...]]:
        found: list[Any] = [
            model.apply(variables(p), tokens[part], at, cache, last=1)
            for p, part, at, cache in zip(params, parts, slots, caches, strict=True)
        ]
        logits = jnp.concatenate([each[0][:, -1] for each in found])
        return (logits[:B], logits[B:]), tuple(each[1] for each in found)

    def drawn(state: Both, logits: Any, caches: tuple[Cache, ...]) -> Both:
        combined = contrast(*logits, state.step)
        penalised = penalise(combined, state.seen, jnp.asarray(drawing.sampling.repetition_penalty))
        token = next_token(penalised, drawing.sampling, drawing.keys, state.step)
        token = jnp.where(state.done, PAD, token)
        return Both(
            state.step + 1,
            token,
            state.done | jnp.isin(token, drawing.eos),
            state.seen.at[jnp.arange(B), token].set(True),
            caches,
            state.out.at[:, state.step].set(token),
        )

    def answer_on(state: Both) -> Both:
        slots = [Slots(filled[part], T + state.step - 1) for part in parts]
        return drawn(state, *run(jnp.tile(state.token, 2)[:, None], slots, state.caches))

    logits, caches = run(batch.tokens, [Slots(valid[part]) for part in parts], (None,) * len(parts))
    caches = tuple(extended(cache, T + new - 1) for cache in caches)
    seen = jnp.zeros(logits[0].shape, bool).at[jnp.arange(B)[:, None], batch.tokens[:B]].max(valid[:B])
    nobody = ~valid[:B].any(-1)
    start = Both(jnp.int32(0), jnp.zeros(B, jnp.int32), nobody, seen, caches, jnp.full((B, new), PAD, jnp.int32))
    end = jax.lax.while_loop(
        lambda state: (state.step < new) & ~state.done.all(), answer_on, drawn(start, logits, caches)
    )
    ended = jnp.isin(end.out, drawing.eos) | (jnp.arange(new)[None] >= end.step) | nobody[:, None]
    lengths = jnp.where(ended.any(-1), jnp.argmax(ended, -1), new)
    return Generated(end.out, lengths.astype(jnp.int32))
