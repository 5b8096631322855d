"""Actions of steering rules: what is done to the residual stream of the prompts that a gate lets through.

B batch, L layers, D embed
"""

from collections.abc import Mapping
from typing import Any, Protocol

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsafe.kernels.gates import Gate
from jaxsafe.kernels.steering import PromptStates, Rule
from jaxsafe.model.taps import edit

FAR = 2**30


@flax.struct.dataclass
class Span:
    """Positions first <= p < stop, counted from the instruction's end (0); int32 []."""

    first: Int[Array, ""]
    stop: Int[Array, ""]

    def of(self, end: Int[Array, " B"]) -> dict[str, Int[Array, " B"]]:
        """`start` and `stop` of an edit of rows whose instructions end at the positions `end`."""
        return {"start": jnp.maximum(end + self.first, 0), "stop": end + self.stop}

    @property
    def reaches_prompt(self) -> bool:
        """Whether it begins before the instruction's end."""
        return bool(np.asarray(self.first) < 0)


def span(first: int = 0, stop: int = FAR) -> Span:
    """The positions from `first` to before `stop`, of which 0 is the instruction's end."""
    return Span(jnp.int32(first), jnp.int32(stop))


SPANS: Mapping[str, tuple[int, int]] = {
    "end": (0, 1),
    "end+4": (0, 5),
    "answer": (0, FAR),
    "prompt": (-FAR, 1),
    "all": (-FAR, FAR),
}
"""Where remedies act: at the instruction's end; there and at four tokens of the answer; there and at the whole
answer; at the whole prompt; everywhere."""


def named_span(name: str) -> Span:
    """The span of that name. Raises ValueError for an unknown one."""
    if name not in SPANS:
        raise ValueError(f"span {name!r} is not known; use one of {', '.join(SPANS)}")
    return span(*SPANS[name])


class Action(Protocol):
    """What is done: a pytree of arrays."""

    span: Span

    def edits(self, gate: Float[Array, " B"], end: Int[Array, " B"]) -> dict[str, Any]:
        """{tap: edit} of rows whose instructions end at the positions `end`."""


@flax.struct.dataclass
class Add(Action):
    """vectors [L, D], their strengths included, are added to the residual stream."""

    vectors: Float[Array, "L D"]
    span: Span

    def edits(self, gate: Float[Array, " B"], end: Int[Array, " B"]) -> dict[str, Any]:
        """The edit of "resid"."""
        return {"resid": edit(add=self.vectors, gate=gate, **self.span.of(end))}


@flax.struct.dataclass
class Ablate(Action):
    """The outputs of taps lose their parts along unit vectors {tap: [L, D]}; see `ablation.written_directions`."""

    directions: Mapping[str, Float[Array, "L D"]]
    span: Span

    def edits(self, gate: Float[Array, " B"], end: Int[Array, " B"]) -> dict[str, Any]:
        """An edit of each tap."""
        return {tap: edit(ablate=r, gate=gate, **self.span.of(end)) for tap, r in self.directions.items()}


@flax.struct.dataclass
class Clamp(Action):
    """The stream's part along unit directions [L, D] becomes `level` [L], or at most that where `one_sided`.

    Layers of a zero direction are left alone.
    """

    directions: Float[Array, "L D"]
    level: Float[Array, " L"]
    span: Span
    one_sided: bool = flax.struct.field(pytree_node=False, default=False)

    def edits(self, gate: Float[Array, " B"], end: Int[Array, " B"]) -> dict[str, Any]:
        """The edit of "resid"."""
        where = self.span.of(end)
        if self.one_sided:
            return {"resid": edit(ablate=self.directions, gate=gate, above=self.level, **where)}
        level = self.level[:, None] * self.directions
        return {"resid": edit(add=level, ablate=self.directions, gate=gate, **where)}


@flax.struct.dataclass
class Gated(Rule):
    """A rule of steering: the `action` on prompts that the gate `by` lets through."""

    by: Gate
    action: Action

    @property
    def affirmative(self) -> Int[Array, " A"] | None:
        """That of the gate."""
        return self.by.affirmative

    @property
    def reads_mean(self) -> bool:
        """Whether the gate does."""
        return self.by.reads_mean

    @property
    def reaches_prompt(self) -> bool:
        """Whether the action does."""
        return self.action.span.reaches_prompt

    def score(self, states: PromptStates) -> Float[Array, " B"]:
        """How harmful the gate takes each prompt for."""
        return self.by.score(states)

    def gate(self, states: PromptStates) -> Float[Array, " B"]:
        """1 for prompts that are acted on."""
        return self.by.gate(states)

    def edits(self, gate: Float[Array, " B"], start: Int[Array, " B"]) -> dict[str, Any]:
        """The action's edits."""
        return self.action.edits(gate, start)
