"""How ready a model is to refuse, without generation, under many candidate directions in one program.

The refusal score of arXiv 2406.11717: log of the probability of refusal tokens at the answer's first position against
that of all others.

B batch, L layers, D embed, V vocab, C candidates, R refusal tokens
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafe.kernels.ablation import ablation
from jaxsafe.model.attention import Slots
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import Edit, edit
from jaxsafe.model.transformer import Params, Transformer, variables
from jaxsafe.rows import Batch


def refusal_log_odds(logits: Float[Array, "*n V"], refusal: Int[Array, " R"]) -> Float[Array, "*n"]:
    """log p(refusal tokens) - log p(all others), float32."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    own = jnp.zeros(logits.shape[-1], bool).at[refusal].set(True)
    return _log_sum(log_p, own) - _log_sum(log_p, ~own)


def _log_sum(log_p: Float[Array, "*n V"], chosen: Any) -> Float[Array, "*n"]:
    return jax.nn.logsumexp(jnp.where(chosen, log_p, -jnp.inf), axis=-1)


class CandidateScores(NamedTuple):
    """Of each candidate and prompt.

    ablated: float32 [C, B] refusal log-odds with the unit direction ablated everywhere
    added:   float32 [C, B] the same with the direction added after its block
    kl:      float32 [C, B] KL(unedited || ablated) of the first token of the answer, nats
    """

    ablated: Float[Array, "C B"]
    added: Float[Array, "C B"]
    kl: Float[Array, "C B"]


@functools.partial(jax.jit, static_argnames="config")
def score_candidates(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    directions: Float[Array, "C D"],
    layers: Int[Array, " C"],
    refusal: Int[Array, " R"],
) -> CandidateScores:
    """Every candidate, a difference of means after the block of its number in `layers`, on a batch of prompts."""

    def first_logits(edits: dict[str, Edit] | None) -> Float[Array, "B V"]:
        logits: Any = Transformer(config).apply(variables(params, edits), batch.tokens, Slots(batch.valid), last=1)[0]
        return logits[:, -1].astype(jnp.float32)

    plain = jax.nn.log_softmax(first_logits(None))

    def score(candidate: tuple[Float[Array, " D"], Int[Array, ""]]) -> CandidateScores:
        direction, layer = candidate
        unit = direction / jnp.maximum(jnp.linalg.norm(direction), 1e-12)
        without = first_logits(ablation(config, params, unit))
        here = (jnp.arange(config.layers) == layer).astype(jnp.float32)
        under = first_logits({"resid": edit(add=here[:, None] * direction[None])})
        kl = jnp.sum(jnp.exp(plain) * (plain - jax.nn.log_softmax(without)), axis=-1)
        return CandidateScores(refusal_log_odds(without, refusal), refusal_log_odds(under, refusal), kl)

    return jax.lax.map(score, (directions, layers))


@functools.partial(jax.jit, static_argnames="config")
def first_log_odds(
    config: ModelConfig, params: Params, batch: Batch, refusal: Int[Array, " R"], edits: Any = None
) -> Float[Array, " B"]:
    """Refusal log-odds of each prompt of `batch`."""
    logits: Any = Transformer(config).apply(variables(params, edits), batch.tokens, Slots(batch.valid), last=1)[0]
    return refusal_log_odds(logits[:, -1], refusal)
