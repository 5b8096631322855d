"""AdaSteer (Zhao et al., arXiv 2504.09466): two directions, each as strong as a prompt's own place along it asks for.

A first pass, unedited, places a prompt between two classes at a probe layer, d = 100 (h - a) . u / |b - a| with u the
unit vector from a to b (0 at the mean a, 100 at the mean b). The second adds alpha(d_R) v_R + beta(d_H) v_H to the
residual stream after every block, at the positions of the prompt alone. v_R points from harmful prompts that are
answered to those that are refused, v_H from pseudo-harmful to harmful prompts. The function that combines v_H with v_R
is not in the published code: here v_H loses its part along v_R (ours).

B batch, L layers, D embed
"""

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsafe.kernels.steering import PromptStates, Rule
from jaxsafe.methods.evidence import Evidence, mean_difference
from jaxsafe.model.taps import Both, edit


@dataclasses.dataclass(frozen=True)
class Coefficient:
    """clip(slope (d - centre) + offset, low, high), d read after the block of number `layer`, counted from 1."""

    layer: int
    slope: float
    centre: float
    low: float
    high: float = float("inf")
    offset: float = 0.0


PUBLISHED = {
    "llama3.1-8b": (Coefficient(9, 0.02, -60, -0.22, -0.08), Coefficient(14, -0.05, -5, -0.75, offset=-0.5)),
    "qwen2.5-7b": (Coefficient(6, 0.1, 140, -0.2, 0.0), Coefficient(14, -0.06, 50, -0.6, 0.4)),
    "gemma2-9b": (Coefficient(13, 0.004, 35, -0.02, 0.06), Coefficient(20, 0.01, 50, -0.06, 0.02)),
}
"""The coefficients (alpha of v_R, beta of v_H) of the published code, by model."""


@flax.struct.dataclass
class AdaSteer(Rule):
    """The rule: what is added along two directions; the axis 2 is (v_R, v_H).

    vectors: float32 [2, L, D]
    probes:  int32 [2] the blocks, counted from 0, after which a prompt is placed
    means:   float32 [2, 2, D] the two class means there: d is 0 at the first and 100 at the second
    slope, shift, low, high: float32 [2] coefficients clip(slope d + shift, low, high)
    """

    vectors: Float[Array, "2 L D"]
    probes: Int[Array, "2"]
    means: Float[Array, "2 2 D"]
    slope: Float[Array, "2"]
    shift: Float[Array, "2"]
    low: Float[Array, "2"]
    high: Float[Array, "2"]
    reaches_prompt: bool = flax.struct.field(pytree_node=False, default=True)

    def places(self, states: PromptStates) -> Float[Array, "2 B"]:
        """d of each prompt along both directions."""
        h = states.at_end[self.probes].astype(jnp.float32)
        way = self.means[:, 1] - self.means[:, 0]
        return 100 * jnp.einsum("xbd,xd->xb", h - self.means[:, 0, None], way) / jnp.sum(way**2, -1)[:, None]

    def score(self, states: PromptStates) -> Float[Array, " B"]:
        """d_R."""
        return self.places(states)[0]

    def gate(self, states: PromptStates) -> Float[Array, "B 2"]:
        """alpha and beta."""
        asked = self.slope[:, None] * self.places(states) + self.shift[:, None]
        return jnp.clip(asked, self.low[:, None], self.high[:, None]).T

    def edits(self, gate: Float[Array, "B 2"], start: Int[Array, " B"]) -> dict[str, Any]:
        """alpha v_R + beta v_H after every block, at the positions of the prompt."""
        parts = (edit(add=self.vectors[i], gate=gate[:, i], stop=start + 1) for i in range(2))
        return {"resid": Both(*parts)}


def adasteer(evidence: Evidence, alpha: Coefficient, beta: Coefficient) -> AdaSteer:
    """The rule of these coefficients, its directions and class means from `evidence`.

    Means of d_R are those of harmful prompts that are answered (100) and refused (0), and of d_H those of harmful (0)
    and of safe prompts that are refused (100). Where no harmful prompt is answered, safe answered ones take its place
    (ours). Raises ValueError where no safe prompt is refused, and for a layer that the model lacks.
    """
    for layer in (alpha.layer, beta.layer):
        if not 1 <= layer <= evidence.layers:
            raise ValueError(f"AdaSteer reads layer {layer}; this model has layers 1 to {evidence.layers}")
    refused, pseudo = evidence.states(True, True), evidence.states(False, True)
    answers = evidence.harmful & ~evidence.refused
    answered = evidence.at_end[answers] if answers.any() else evidence.states(False, False)
    v_r, v_h = mean_difference(refused, answered), mean_difference(evidence.states(True), pseudo)
    along = np.sum(v_h * v_r, -1, keepdims=True) / np.maximum(np.sum(v_r**2, -1, keepdims=True), 1e-12)
    probes = [alpha.layer - 1, beta.layer - 1]
    classes = [(refused, answered), (evidence.states(True), pseudo)]
    means = [[side[:, p].mean(0) for side in pair] for p, pair in zip(probes, classes, strict=True)]
    both = (alpha, beta)

    def of(name: str) -> Float[Array, "2"]:
        return jnp.asarray([getattr(c, name) for c in both], jnp.float32)

    shift = jnp.asarray([c.offset - c.slope * c.centre for c in both], jnp.float32)
    vectors = jnp.asarray(np.stack([v_r, v_h - along * v_r]), jnp.float32)
    place = jnp.asarray(probes, jnp.int32), jnp.asarray(np.array(means), jnp.float32)
    return AdaSteer(vectors, *place, of("slope"), shift, of("low"), of("high"))
