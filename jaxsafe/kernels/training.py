"""Supervised fine-tuning on answers: the loss, one step, the order of the data, and a short run.

B batch, T slots, R last slots that hold answers, D embed, V vocab
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsafe.kernels.prompt import final_states, prompt_inputs
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params, unembed, unembedding
from jaxsafe.text.batches import Batch, Row, group_by_length, pad_rows


def answer_nll(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    edits: Any = None,
    last: int | None = None,
    block: int = 64,
    remat: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Summed negative log-likelihood (nats) of each row's answer tokens, float32 [B], and their counts, int32 [B].

    `last` (static) is a number of final slots that holds every answer; only their logits are computed, those
    of `block` slots (static) at a time. A backward pass keeps what the products with weights gave; with `remat`
    (static) it computes each layer again.
    """
    T = batch.tokens.shape[1]
    last = T - 1 if last is None else min(last, T - 1)
    given = prompt_inputs(config, params, batch, edits=edits)
    states = final_states(config, params, given, edits, "nothing" if remat else "products")
    return nll_after(config, params, batch, states[:, max(0, states.shape[1] - last - 1) :], block)


def nll_after(
    config: ModelConfig, params: Params, batch: Batch, states: jax.Array, block: int
) -> tuple[jax.Array, jax.Array]:
    """What `answer_nll` returns, from the normed `states` [B, R, D] of the last R slots, which predict every answer."""
    first = batch.tokens.shape[1] - states.shape[1] + 1
    # A slot predicts the token of the next one, and the last slot nothing.
    target, counted = (jnp.pad(a[:, first:], [(0, 0), (0, 1)]) for a in (batch.tokens, batch.response))
    nll = token_nll(config, params, states, target, block)
    return jnp.sum(jnp.where(counted, nll, 0), axis=1), counted.sum(axis=1)


def token_nll(config: ModelConfig, params: Params, states: jax.Array, target: jax.Array, block: int) -> jax.Array:
    """Negative log-likelihood (nats) of `target` int32 [B, R] after the normed `states` [B, R, D], float32 [B, R].

    At most [B, block, V] logits exist at a time, in the backward pass too.
    """
    head = unembedding(config, params)
    B, R = target.shape

    def some(states: jax.Array, target: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(unembed(states, head, config.tied), target)

    def blocks(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, [(0, 0), (0, -R % block), *[(0, 0)] * (a.ndim - 2)])
        return padded.reshape(B, -1, block, *a.shape[2:]).swapaxes(0, 1)

    if block >= R:
        return some(states, target)
    nll = jax.lax.map(lambda pair: jax.checkpoint(some)(*pair), (blocks(states), blocks(target)))
    return nll.swapaxes(0, 1).reshape(B, -1)[:, :R]


def answer_loss(config: ModelConfig, params: Params, batch: Batch, last: int | None = None) -> jax.Array:
    """Mean negative log-likelihood (nats) of the answer tokens of `batch`."""
    nll, count = answer_nll(config, params, batch, last=last)
    return nll.sum() / jnp.maximum(count.sum(), 1)


def masters(params: Params) -> Any:
    """A float32 copy of `params`: what an optimiser moves, by steps that bfloat16 would round away."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32), dict(params))


def model_weights(config: ModelConfig, masters: Params, fixed: Any = None) -> Any:
    """The weights in the model's dtype of `masters`, its parameters in float32. `fixed` is not read."""
    return jax.tree.map(lambda p: p.astype(config.dtype), dict(masters))


def value_and_gradient(
    loss: Callable[[Any, Batch], jax.Array], params: Any, batch: Batch, accumulation: int = 1
) -> tuple[jax.Array, Any]:
    """Value and gradient at `params` of `loss(params, batch)`, a sum over rows, in `accumulation` parts of the rows.

    A part takes every `accumulation`-th row, so that rows split over devices stay where they are. Raises
    ValueError where the parts are not equal.
    """
    rows = batch.tokens.shape[0]
    if rows % accumulation:
        raise ValueError(f"a batch of {rows} rows does not divide into {accumulation} equal parts")
    if accumulation == 1:
        return jax.value_and_grad(loss)(params, batch)
    parts = jax.tree.map(lambda a: a.reshape(-1, accumulation, *a.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part)), None

    return jax.lax.scan(add, (jnp.float32(0), jax.tree.map(jnp.zeros_like, params)), parts)[0]


def one_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    params: Any,
    state: Any,
    batch: Batch,
    last: int,
    fixed: Any = None,
    weights_of: Callable[[ModelConfig, Any, Any], Params] = model_weights,
    accumulation: int = 1,
    remat: bool = False,
) -> tuple[Any, Any, jax.Array]:
    """Parameters, optimiser state and mean loss of the answer tokens (before the step) after one step.

    `params` is what is trained, in float32, and `fixed` what is not; `weights_of(config, params, fixed)` are
    the weights of the model.
    """
    total = jnp.maximum(batch.response.sum(), 1)

    def loss(params: Any, batch: Batch) -> jax.Array:
        nll, _ = answer_nll(config, weights_of(config, params, fixed), batch, last=last, remat=remat)
        return nll.sum() / total

    value, gradient = value_and_gradient(loss, params, batch, accumulation)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value


@functools.partial(jax.jit, static_argnames=("config", "optimizer", "last"), donate_argnames=("params", "state"))
def train_step(
    config: ModelConfig, optimizer: optax.GradientTransformation, params: Any, state: Any, batch: Batch, last: int
) -> tuple[Any, Any, jax.Array]:
    """Parameters, optimiser state and loss after one step; the given parameters and state are consumed."""
    return one_step(config, optimizer, params, state, batch, last)


def batch_plan(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[np.ndarray]:
    """The indices of the rows of each of `steps` batches, for rows of these `lengths`.

    Rows of a batch are of like length, all are seen once an epoch, and the order follows from `seed` alone:
    the batch of a step is the same whatever was run before. Raises ValueError for no rows.
    """
    if not lengths:
        raise ValueError("there are no rows to train on; give at least one prompt with an answer")
    rng = np.random.default_rng(seed)
    plan: list[np.ndarray] = []
    while len(plan) < steps:
        order = rng.permutation(len(lengths))
        groups = group_by_length([lengths[i] for i in order], batch_size)
        plan += [order[groups[i]] for i in rng.permutation(len(groups))]
    return plan[:steps]


def training_batches(rows: Sequence[Row], batch_size: int, steps: int, seed: int) -> list[Batch]:
    """The batches of a `batch_plan`, each padded to `batch_size` rows. Raises ValueError for no rows."""
    plan = batch_plan([len(row.ids) for row in rows], batch_size, steps, seed)
    return [pad_rows([rows[i] for i in indices], count=batch_size) for indices in plan]


def fine_tune(
    config: ModelConfig,
    params: Params,
    batches: Sequence[Batch],
    optimizer: optax.GradientTransformation,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Any:
    """The parameters after one optimiser step a batch; `params` themselves are left as they are."""
    params = masters(params)
    state = optimizer.init(params)
    last = max(int(np.max(batch.tokens.shape[1] - 1 - batch.instruction_end)) for batch in batches)
    for step, batch in enumerate(batches):
        params, state, loss = train_step(config, optimizer, params, state, batch, last)
        on_step(step, float(loss))
    return model_weights(config, params)
