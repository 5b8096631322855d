"""Mean and variance of what heads and neurons hand to the maps that read them, over the tokens of responses.

B batch, L layers, F features of a tap
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsafe.chat.model import ChatModel
from jaxsafe.kernels.forward import capture
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import RowMoments
from jaxsafe.model.transformer import Params
from jaxsafe.progress import Progress, silent
from jaxsafe.rows import Batch, Row

INPUTS = {"o": "heads", "down": "mlp_hidden"}
"""Map that reads units -> the tap of its inputs; what it gives passes the tap of its own name, before any norm."""


@dataclasses.dataclass(frozen=True)
class InputMoments:
    """Mean and variance of the inputs of o and down over tokens of responses, float64 [L, F] by tap."""

    mean: Mapping[str, Float[np.ndarray, "L F"]]
    variance: Mapping[str, Float[np.ndarray, "L F"]]


def input_moments(
    model: ChatModel, rows: Sequence[Row], as_coded: bool = False, batch_size: int = 16, done: Progress = silent
) -> InputMoments:
    """The moments of `rows` (prompts with their responses), in one pass in their order.

    `as_coded` is the published estimate: the mean of the rows' means, and squares about that of the rows so far, summed
    over a row's tokens but divided by the number of rows; the first row adds nothing. It depends on the order of rows.
    `done` is called with numbers of rows. Raises ValueError for no rows, and for one without a response.
    """
    if not rows:
        raise ValueError("there are no rows to read; give at least one prompt with its response")
    counts = [len(row.ids) - 1 - row.instruction_end for row in rows]
    if not all(counts):
        raise ValueError(f"row {counts.index(0)} has no response; each needs at least one token of it")

    def call(batch: Batch, indices: np.ndarray) -> Any:
        return _row_moments(model.config, model.params, batch, model.edits)

    def moments() -> Iterator[np.ndarray]:
        for start in range(0, len(rows), batch_size):
            yield from model.map(call, rows[start : start + batch_size], batch_size, done)

    mean, variance = merged(zip(counts, moments(), strict=True), as_coded)
    edge = model.config.heads * model.config.head_dim

    def by_tap(a: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(INPUTS.values(), np.split(a, [edge], axis=-1), strict=True))

    return InputMoments(by_tap(mean), by_tap(variance))


@functools.partial(jax.jit, static_argnames="config")
def _row_moments(config: ModelConfig, params: Params, batch: Batch, edits: Any = None) -> Float[Array, "B 2 L F"]:
    """Of the responses, the channels of both taps in a row."""
    taps = tuple(INPUTS.values())
    reduce = dict.fromkeys(taps, RowMoments(batch.response))
    read = capture(config, params, batch.tokens, batch.valid, taps, edits, reduce)
    return jnp.moveaxis(jnp.concatenate([read[tap] for tap in taps], axis=-1), 0, 2)


def merged(
    rows: Iterable[tuple[int, Float[np.ndarray, "2 ..."]]], as_coded: bool = False
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Mean and variance, float64, from the (number of tokens, (mean, squares about it)) of one row after the other."""
    mean: np.ndarray = np.zeros(())
    variance = mean
    tokens = 0
    for n, (count, moments) in enumerate(rows):
        own, squares = np.asarray(moments, np.float64)
        shift = own - mean
        if as_coded:
            mean = mean + shift / (n + 1)
            added = squares + count * (own - mean) ** 2
            variance = variance * (n - 1) / n + added / (n + 1) if n else np.zeros_like(added)
        else:
            mean = mean + shift * count / (tokens + count)
            variance = (variance * tokens + squares + count * shift * (own - mean)) / (tokens + count)
            tokens += count
    return mean, variance
