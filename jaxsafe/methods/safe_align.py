"""Safe-Align, the in-context vector of Safety Arithmetic (Hazra et al., arXiv 2406.11801).

A pair is one question with a safe and with an unsafe answer. A text is read as the mean state of its last four tokens
after every block, the states of all blocks in one row; v is the mean of the differences unsafe - safe plus their first
principal axis, of length 1. What every MLP adds to the stream, x, is turned away from the part v_l of its block:

    x <- |x| unit(unit(x) - 0.1 alpha (1 + max(0, cos(x, v_l))) unit(v_l)),    alpha = 0.12

at every position, so that its length stays. This is what their code computes; the paper writes it at the stream.
Ours: the axis, which has no sign of its own, points along the mean; the pairs, since theirs hold harmful answers.

n pairs, L layers, D embed
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsafe.chat.model import ChatModel
from jaxsafe.kernels.forward import capture
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.taps import AtAndMean
from jaxsafe.model.transformer import Params
from jaxsafe.model.turn import Turn
from jaxsafe.progress import Progress, silent
from jaxsafe.rows import Batch, Row


@dataclasses.dataclass(frozen=True)
class SafeAlign:
    """Published settings; tokens: how many last ones a text is read at; layers: blocks that are edited, None for all.

    Published for models with edited facts: the blocks about the edited one.
    """

    alpha: float = 0.12
    tokens: int = 4
    layers: LayerRange | None = None
    batch_size: int = 16


def safe_align(
    model: ChatModel,
    safe: Sequence[Row],
    unsafe: Sequence[Row],
    settings: SafeAlign = SafeAlign(),
    done: Progress = silent,
) -> ChatModel:
    """The model with the edit; `safe[i]` and `unsafe[i]` are one question with two answers.

    `done` is called with numbers of texts. Raises ValueError where there are no pairs, or one list is longer.
    """
    if not safe or len(safe) != len(unsafe):
        raise ValueError(f"{len(safe)} safe and {len(unsafe)} unsafe texts are no pairs; give one of each per question")
    states = text_states(model, [*unsafe, *safe], settings, done)
    vector = in_context_vector(states[: len(unsafe)] - states[len(unsafe) :])
    return model.with_edits({**(model.edits or {}), "mlp_out": turn_away(vector, settings)})


def in_context_vector(differences: Float[np.ndarray, "n L D"]) -> Float[np.ndarray, "L D"]:
    """The mean of the differences plus their first principal axis, over all layers at once; float32."""
    rows = differences.reshape(len(differences), -1).astype(np.float64)
    mean = rows.mean(0)
    _, spread, axes = np.linalg.svd(rows - mean, full_matrices=False)
    axis = axes[0] * np.where(axes[0] @ mean < 0, -1, 1) * (spread[0] > 0)
    return (mean + axis).reshape(differences.shape[1:]).astype(np.float32)


def turn_away(vector: Float[np.ndarray, "L D"], settings: SafeAlign = SafeAlign()) -> Turn:
    """The edit of the tap "mlp_out" that turns away from `vector`."""
    layers = settings.layers or LayerRange(0, len(vector))
    strength = 0.1 * settings.alpha * np.asarray(layers.mask(len(vector)), np.float32)
    return Turn(jnp.asarray(-vector), jnp.asarray(strength, jnp.float32))


def text_states(
    model: ChatModel, rows: Sequence[Row], settings: SafeAlign = SafeAlign(), done: Progress = silent
) -> Float[np.ndarray, "n L D"]:
    """The mean of the stream after each block over the last tokens of each text; float32."""

    def call(batch: Batch, indices: np.ndarray) -> Any:
        return _last_states(model.config, model.params, batch, settings.tokens, model.edits)

    return model.map(call, rows, settings.batch_size, done)


@functools.partial(jax.jit, static_argnames=("config", "tokens"))
def _last_states(
    config: ModelConfig, params: Params, batch: Batch, tokens: int, edits: Any = None
) -> Float[Array, "B L D"]:
    T = batch.tokens.shape[1]
    counted = batch.valid & (jnp.arange(T) >= T - tokens)[None]
    reduce = {"resid": AtAndMean(jnp.zeros((len(batch.tokens), 0), jnp.int32), counted)}
    read = capture(config, params, batch.tokens, batch.valid, edits=edits, reduce=reduce)["resid"]
    return jnp.swapaxes(read[:, :, 0], 0, 1)
