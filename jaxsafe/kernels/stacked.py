"""Several models of one configuration at once: the same prompts and texts, other weights, one program.

M models, B batch
"""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from jaxsafe.kernels.generate import Generated, prefill_and_decode
from jaxsafe.kernels.likelihood import answer_nll
from jaxsafe.kernels.sampling import Drawing
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.rows import Batch

MODELS = "models"
"""The name of the mapped axis."""


@functools.partial(jax.jit, static_argnames="config")
def stacked_answers(
    config: ModelConfig, stack: Params, batch: Batch, drawing: Drawing, edits: Any = None
) -> tuple[Generated, ...]:
    """What `prefill_and_decode` gives for each model of `stack`, whose tensors have a leading axis M."""

    def answer(params: Params) -> Generated:
        return prefill_and_decode(config, params, batch, drawing, edits, MODELS)

    return _apart(jax.vmap(answer, axis_name=MODELS)(stack))


@functools.partial(jax.jit, static_argnames=("config", "last"))
def stacked_nll(
    config: ModelConfig, stack: Params, batch: Batch, edits: Any = None, last: int | None = None
) -> tuple[tuple[Float[Array, " B"], Int[Array, " B"]], ...]:
    """What `answer_nll` gives for each model of `stack`."""
    return _apart(jax.vmap(lambda params: answer_nll(config, params, batch, edits, last))(stack))


def _apart(tree: Any) -> tuple[Any, ...]:
    """The entries of the leading axis M."""
    leaves, structure = jax.tree.flatten(tree)
    return tuple(jax.tree.unflatten(structure, each) for each in zip(*leaves, strict=True))
