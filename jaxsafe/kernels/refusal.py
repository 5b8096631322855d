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
from jaxsafe.kernels.forward import prompt_inputs
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import edit
from jaxsafe.model.transformer import Edits, Params, Transformer, variables
from jaxsafe.rows import Batch


def refusal_log_odds(logits: Float[Array, "*n V"], refusal: Int[Array, " R"]) -> Float[Array, "*n"]:
    """log p(refusal tokens) - log p(all others), float32."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    own = jnp.zeros(logits.shape[-1], bool).at[refusal].set(True)
    return _log_sum(log_p, own) - _log_sum(log_p, ~own)


def _log_sum(log_p: Float[Array, "*n V"], chosen: Any) -> Float[Array, "*n"]:
    return jax.nn.logsumexp(jnp.where(chosen, log_p, -jnp.inf), axis=-1)


class Ablated(NamedTuple):
    """Of each candidate and prompt, with its unit direction ablated everywhere.

    log_odds: float32 [C, B] of refusal; kl: float32 [C, B] KL(unedited || ablated) of the answer's first token, nats
    """

    log_odds: Float[Array, "C B"]
    kl: Float[Array, "C B"]


@functools.partial(jax.jit, static_argnames="config")
def ablated_scores(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    directions: Float[Array, "C D"],
    refusal: Int[Array, " R"],
) -> Ablated:
    """A batch of prompts without each of `directions`."""
    plain = jax.nn.log_softmax(_first_logits(config, params, batch, None))

    def score(direction: Float[Array, " D"]) -> Ablated:
        unit = direction / jnp.maximum(jnp.linalg.norm(direction), 1e-12)
        without = _first_logits(config, params, batch, ablation(config, params, unit))
        kl = jnp.sum(jnp.exp(plain) * (plain - jax.nn.log_softmax(without)), axis=-1)
        return Ablated(refusal_log_odds(without, refusal), kl)

    return jax.lax.map(score, directions)


@functools.partial(jax.jit, static_argnames="config")
def added_log_odds(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    directions: Float[Array, "C D"],
    layers: Int[Array, " C"],
    refusal: Int[Array, " R"],
) -> Float[Array, "C B"]:
    """Refusal log-odds of a batch of prompts with each of `directions` added after the block of its number."""

    def score(candidate: tuple[Float[Array, " D"], Int[Array, ""]]) -> Float[Array, " B"]:
        direction, layer = candidate
        here = (jnp.arange(config.layers) == layer).astype(jnp.float32)
        edits = {"resid": edit(add=here[:, None] * direction[None])}
        return refusal_log_odds(_first_logits(config, params, batch, edits), refusal)

    return jax.lax.map(score, (directions, layers))


def _first_logits(config: ModelConfig, params: Params, batch: Batch, edits: Edits) -> Float[Array, "B V"]:
    """Of the answers' first tokens, float32; all prompts have the same `edits`, and share what they begin with."""
    given = prompt_inputs(config, params, batch, edits=edits, alike=True)
    logits: Any = Transformer(config).apply(variables(params, edits), *given, last=1)[0]
    return logits[:, -1].astype(jnp.float32)
