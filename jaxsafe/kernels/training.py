"""Supervised fine-tuning on answers: one step, and the order of the data.

B batch, T slots, R last slots that hold answers, D embed, V vocab
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt

from jaxsafe.kernels.forward import joined_states
from jaxsafe.kernels.likelihood import nll_after
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.rows import Batch, group_by_length


def masters(params: Params) -> Any:
    """A float32 copy of `params`: what an optimiser moves, by steps that bfloat16 would round away."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32), dict(params))


def model_weights(config: ModelConfig, masters: Params, fixed: Any = None, keys: Any = None) -> Any:
    """The weights in the model's dtype of `masters`, its parameters in float32. `fixed` and `keys` are not read."""
    return jax.tree.map(lambda p: p.astype(config.dtype), dict(masters))


def value_and_gradient(
    loss: Callable[[Any, Any], jax.Array], params: Any, batch: Any, accumulation: int = 1
) -> tuple[jax.Array, Any]:
    """Value and gradient at `params` of `loss(params, batch)`, a sum over rows, in `accumulation` parts of the rows.

    `batch` is a tree whose leading axis is that of the rows. A part takes every `accumulation`-th row, so that rows
    split over devices stay where they are. Raises ValueError where the parts are not equal.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % accumulation:
        raise ValueError(f"a batch of {rows} rows does not divide into {accumulation} equal parts")
    if accumulation == 1:
        return jax.value_and_grad(loss)(params, batch)
    parts = jax.tree.map(lambda a: a.reshape(-1, accumulation, *a.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part)), None

    return jax.lax.scan(add, (jnp.float32(0), jax.tree.map(jnp.zeros_like, params)), parts)[0]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a step is made: the static part of a compiled program.

    last: a number of final slots that holds every answer token; weights_of: (config, what is trained, what is fixed,
    keys of the rows or None) -> the weights that a step runs; accumulation: how many parts a batch is taken in; remat:
    whether layers are computed again in the backward pass instead of being kept.
    """

    config: ModelConfig
    optimizer: optax.GradientTransformation
    last: int
    weights_of: Callable[[ModelConfig, Any, Any, Any], Params] = model_weights
    accumulation: int = 1
    remat: bool = False


def one_step(recipe: Recipe, tree: Any, batch: Batch, fixed: Any = None) -> tuple[Any, Float[Array, ""]]:
    """The tree {"params", "optimizer"} after one step, and the mean loss of the answer tokens (nats) before it.

    "params" are what is trained, in float32, "optimizer" is the optimiser's state, `fixed` what is not trained, with
    the "rate" that the optimiser is given. Where there is a "key", uint32 [2], something is dropped: each row gets a
    key of its own, and the tree the next one.
    """
    total = jnp.maximum(batch.response.sum(), 1).astype(jnp.float32)
    keys, following = _drawn(tree, batch.tokens.shape[0])
    given = {} if fixed is None else {"rate": fixed["rate"]}

    def loss(params: Any, part: tuple[Batch, Any]) -> jax.Array:
        rows, keys = part
        return answer_loss(recipe, recipe.weights_of(recipe.config, params, fixed, keys), rows) / total

    params = tree["params"]
    value, gradient = value_and_gradient(loss, params, (batch, keys), recipe.accumulation)
    with jax.numpy_dtype_promotion("standard"):  # optax takes powers of integer counts
        updates, state = recipe.optimizer.update(gradient, tree["optimizer"], params, **given)
    return {"params": optax.apply_updates(params, updates), "optimizer": state, **following}, value


def answer_loss(recipe: Recipe, weights: Params, batch: Batch) -> Float[Array, ""]:
    """Summed negative log-likelihood (nats) of the answer tokens; what all rows begin with is run once for them."""
    states = joined_states(recipe.config, weights, batch, "nothing" if recipe.remat else "products")
    return nll_after(recipe.config, weights, batch, states, last=recipe.last)[0].sum()


def _drawn(tree: Any, rows: int) -> tuple[UInt[Array, "B 2"] | None, dict[str, Any]]:
    """Keys of the rows of a step, and the part of the next tree that the next ones follow from."""
    if "key" not in tree:
        return None, {}
    now, following = jax.random.split(jax.random.wrap_key_data(tree["key"]))
    return jax.random.key_data(jax.random.split(now, rows)), {"key": jax.random.key_data(following)}


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
