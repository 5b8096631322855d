"""Supervised fine-tuning on answers: the loss, one step, and a short run.

B batch, T slots, R last slots that hold answers
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params, forward
from jaxsafe.text.batches import Batch, Row, group_by_length, pad_rows


def answer_nll(
    config: ModelConfig, params: Params, batch: Batch, edits: Any = None, last: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Summed negative log-likelihood (nats) of each row's answer tokens, float32 [B], and their counts, int32 [B].

    `last` (static) is a number of final slots that holds every answer; only their logits are computed.
    """
    T = batch.tokens.shape[1]
    last = T - 1 if last is None else min(last, T - 1)
    logits = forward(config, params, batch.tokens, batch.valid, edits, last=last + 1)[:, :-1]
    target, counted = batch.tokens[:, T - last :], batch.response[:, T - last :]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return jnp.sum(jnp.where(counted, nll, 0), axis=1), counted.sum(axis=1)


def answer_loss(config: ModelConfig, params: Params, batch: Batch, last: int | None = None) -> jax.Array:
    """Mean negative log-likelihood (nats) of the answer tokens of `batch`."""
    nll, count = answer_nll(config, params, batch, last=last)
    return nll.sum() / jnp.maximum(count.sum(), 1)


@functools.partial(jax.jit, static_argnames=("config", "optimizer", "last"), donate_argnames=("params", "state"))
def train_step(
    config: ModelConfig, optimizer: optax.GradientTransformation, params: Any, state: Any, batch: Batch, last: int
) -> tuple[Any, Any, jax.Array]:
    """Parameters, optimiser state and loss after one step; the given parameters and state are consumed."""
    loss, gradient = jax.value_and_grad(lambda p: answer_loss(config, p, batch, last))(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss


def training_batches(rows: Sequence[Row], batch_size: int, steps: int, seed: int) -> list[Batch]:
    """`steps` batches of rows of like length, all of them seen once an epoch, their order drawn from `seed`.

    Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("there are no rows to train on; give at least one prompt with an answer")
    rng = np.random.default_rng(seed)
    batches: list[Batch] = []
    while len(batches) < steps:
        shuffled = [rows[i] for i in rng.permutation(len(rows))]
        groups = group_by_length([len(row.ids) for row in shuffled], batch_size)
        groups = [groups[i] for i in rng.permutation(len(groups))]
        batches += [pad_rows([shuffled[i] for i in group], count=batch_size) for group in groups]
    return batches[:steps]


def fine_tune(
    config: ModelConfig,
    params: Params,
    batches: Sequence[Batch],
    optimizer: optax.GradientTransformation,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Any:
    """The parameters after one optimiser step a batch; `params` themselves are left as they are."""
    params = jax.tree.map(jnp.copy, dict(params))
    state = optimizer.init(params)
    last = max(int(np.max(batch.tokens.shape[1] - 1 - batch.instruction_end)) for batch in batches)
    for step, batch in enumerate(batches):
        params, state, loss = train_step(config, optimizer, params, state, batch, last)
        on_step(step, float(loss))
    return params
