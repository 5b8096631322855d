"""Gates of steering rules: which prompts a remedy for over-refusal acts on.

A gate makes one number of what a rule reads at a prompt, the higher the more harmful; it opens (1) for prompts below
its threshold, which it takes for safe, and stays shut (0) for the others.

B batch, L layers, D embed, A tokens of the affirmative
"""

from typing import Any, Protocol

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsafe.kernels.steering import PromptStates, layer_cosines, mean_cosine


class Gate(Protocol):
    """Which prompts are acted on: a pytree of arrays. What it reads is named as by `Rule`."""

    affirmative: Any = None
    reads_mean: Any = False

    def score(self, states: PromptStates) -> Float[Array, " B"]:
        """How harmful each prompt seems."""

    def gate(self, states: PromptStates) -> Float[Array, " B"]:
        """1 for prompts that are acted on, 0 for others."""


@flax.struct.dataclass
class Open(Gate):
    """Acts on every prompt."""

    def score(self, states: PromptStates) -> Float[Array, " B"]:
        """0."""
        return jnp.zeros(states.at_end.shape[1])

    def gate(self, states: PromptStates) -> Float[Array, " B"]:
        """1."""
        return jnp.ones(states.at_end.shape[1])


@flax.struct.dataclass
class Transition(Gate):
    """The classifier of SCANS: how like the harmful anchors' a prompt's change toward the affirmative is.

    reference:   float32 [L, D] mean change of the harmful anchors
    scored:      float32 [L] 1 for the layers whose cosines are averaged
    threshold:   float32 [] safe below it
    affirmative: int32 [A]
    """

    reference: Float[Array, "L D"]
    scored: Float[Array, " L"]
    threshold: Float[Array, ""]
    affirmative: Int[Array, " A"]

    def score(self, states: PromptStates) -> Float[Array, " B"]:
        """The mean cosine of a prompt's change with the reference (arXiv 2408.11491, section 3.3)."""
        assert states.change is not None
        return mean_cosine(layer_cosines(states.change, self.reference), self.scored)

    def gate(self, states: PromptStates) -> Float[Array, " B"]:
        """1 below the threshold."""
        return _below(self.score(states), self.threshold)


@flax.struct.dataclass
class Linear(Gate):
    """A linear classifier of the residual stream at the instruction's end: a projection, or a logistic regression.

    weights:   float32 [L, D], zero for layers that are not read
    bias:      float32 []
    threshold: float32 [] safe below it
    """

    weights: Float[Array, "L D"]
    bias: Float[Array, ""]
    threshold: Float[Array, ""]

    def score(self, states: PromptStates) -> Float[Array, " B"]:
        """sum over layers of weights . state, plus bias; float32."""
        # A product and a sum, not a matrix product: the same in every size of batch.
        return jnp.sum(states.at_end.astype(jnp.float32) * self.weights[:, None], axis=(0, 2)) + self.bias

    def gate(self, states: PromptStates) -> Float[Array, " B"]:
        """1 below the threshold."""
        return _below(self.score(states), self.threshold)


@flax.struct.dataclass
class Condition(Gate):
    """The condition of CAST (arXiv 2409.05907): how much of a prompt's state lies along a condition vector.

    vector:    float32 [L, D] unit condition vectors
    layer:     float32 [L] 1 at the layer that is read
    threshold: float32 [] safe below it, after `sign`
    sign:      float32 [] 1 where harmful prompts are more similar to the vector, -1 where they are less so
    """

    vector: Float[Array, "L D"]
    layer: Float[Array, " L"]
    threshold: Float[Array, ""]
    sign: Float[Array, ""]
    reads_mean: bool = flax.struct.field(pytree_node=False, default=True)

    def score(self, states: PromptStates) -> Float[Array, " B"]:
        """sign * cos(h, tanh((h . c) c)) of a prompt's mean state h at the layer that is read.

        The tanh is the published code's.
        """
        assert states.mean is not None
        h = states.mean
        along = jnp.tanh(jnp.sum(h * self.vector[:, None], axis=-1, keepdims=True) * self.vector[:, None])
        similarity = jnp.sum(h * along, -1) / jnp.maximum(jnp.linalg.norm(h, axis=-1) * _norm(along), 1e-12)
        return self.sign * jnp.sum(similarity * self.layer[:, None], axis=0)

    def gate(self, states: PromptStates) -> Float[Array, " B"]:
        """1 below the threshold."""
        return _below(self.score(states), self.threshold)


def _norm(x: Float[Array, "L B D"]) -> Float[Array, "L B"]:
    return jnp.linalg.norm(x, axis=-1)


def _below(score: Float[Array, " B"], threshold: Float[Array, ""]) -> Float[Array, " B"]:
    return jnp.where(score < threshold, 1.0, 0.0)
