"""Answer first, mend second: only answers that refuse, to prompts that a gate takes for safe, are made again.

Compliant answers, answers to prompts that the gate takes for harmful, and texts that are read are left as they are.

B batch, N rows that are answered again
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxsafe.kernels.sampling import Drawing
from jaxsafe.kernels.steering import Prefilled, Rule
from jaxsafe.rows import Batch


class Refusals(Protocol):
    """Tells refusals, as judges do."""

    @property
    def name(self) -> str:
        """Of the rule."""

    @property
    def version(self) -> str:
        """Of the rule."""

    def refused(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
        """For each answer to a prompt whether it refuses; None where it cannot be told."""


@dataclasses.dataclass(frozen=True)
class Mending:
    """Rows that are refused without steering are answered again under `rules`, one after the other.

    A rule answers the rows that its gate lets through and whose last answer still refuses, as `judge` finds it in the
    text. A row that refuses under the last rule, too, keeps its first answer.
    """

    rules: tuple[Rule, ...]
    judge: Refusals

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError("mending needs at least one rule to answer again by")

    @property
    def affirmative(self) -> Any:
        """The tokens that a rule reads behind the instruction's end; None where none does."""
        return next((rule.affirmative for rule in self.rules if rule.affirmative is not None), None)

    @property
    def reads_mean(self) -> bool:
        """Whether a rule does."""
        return any(rule.reads_mean for rule in self.rules)


@flax.struct.dataclass
class Hand:
    """A batch of prompts in hand: what was read of it, and what its answers are drawn by."""

    batch: Batch
    prefilled: Prefilled
    drawing: Drawing

    def rows(self, numbers: Int[np.ndarray, " N"]) -> "Hand":
        """The rows of these numbers."""
        return _rows(self, numbers)


@jax.jit
def _rows(hand: Hand, numbers: Int[Array, " N"]) -> Hand:
    batch, (cache, states) = hand.batch, (hand.prefilled.cache, hand.prefilled.states)

    def of(a: Array, axis: int) -> Array:
        return jnp.take(a, numbers, axis=axis)

    few: Any = batch
    few = few.replace(
        tokens=of(batch.tokens, 0), valid=of(batch.valid, 0), instruction_end=of(batch.instruction_end, 0), shared=0
    )
    drawing: Any = hand.drawing
    read = Prefilled(*jax.tree.map(lambda a: of(a, 1), (cache, states)))
    return Hand(few, read, drawing.replace(keys=of(drawing.keys, 0)))
