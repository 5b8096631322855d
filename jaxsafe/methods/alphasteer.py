"""AlphaSteer (Sheng et al., arXiv 2506.07022): steering that is zero on the span of benign states.

With H_b the benign and H_m the malicious states that enter a block (last prompt token), Q the right singular vectors
of H_b^T H_b for its smallest share of singular values, P = Q Q^T and X = H_m P, the published matrix is
S = P pinv(X^T X + 10 P^T P) X^T [r; r; ...], and strength * (h_last S) is added at all positions of the prompt. All
rows of the target are the refusal vector r, so S = g r^T has rank one, with g = P pinv(...) X^T 1: a gate that is read
inside the pass, times a vector. No D x D matrix is kept.

n prompts, L layers, D embed
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsafe.kernels.steering import PromptStates, Rule
from jaxsafe.methods.evidence import Evidence, mean_difference
from jaxsafe.model.taps import edit

PUBLISHED: Mapping[str, Mapping[int, float]] = {
    "llama3.1-8b": {8: 0.6, 9: 0.6, 10: 0.6, 11: 0.6, 12: 0.4, 13: 0.5, 14: 0.6, 16: 0.6, 18: 0.6, 19: 0.6},
    "qwen2.5-7b": {
        **dict.fromkeys((5, 6, 7, 8, 10), 0.6), 9: 0.5, **dict.fromkeys((11, 12, 13), 0.6), 14: 0.3, 15: 0.3, 16: 0.5,
        18: 0.5, 19: 0.6,
    },
    "gemma2-9b": {6: 0.5, 8: 0.4, **dict.fromkeys((10, 11, 12, 13, 14, 15, 16, 18), 0.6), 22: 0.5},
}  # fmt: skip
"""Block that is entered, counted from 0: the share of singular values whose vectors span the null space."""


@flax.struct.dataclass
class AlphaSteer(Rule):
    """The rule: add = strength * r [L, D] and read = g [L, D], after the block before the one that is entered."""

    add: Float[Array, "L D"]
    read: Float[Array, "L D"]
    reaches_prompt: bool = flax.struct.field(pytree_node=False, default=True)

    def score(self, states: PromptStates) -> Float[Array, " B"]:
        """The mean of h . g over the layers that are steered, in a pass without edits."""
        h = states.at_end.astype(jnp.float32)
        steered = (self.read != 0).any(-1).sum()
        return jnp.sum(h * self.read[:, None], axis=(0, 2)) / jnp.maximum(steered, 1).astype(jnp.float32)

    def gate(self, states: PromptStates) -> Float[Array, " B"]:
        """1: what a row takes is read inside the pass."""
        return jnp.ones(states.at_end.shape[1])

    def edits(self, gate: Float[Array, " B"], start: Int[Array, " B"]) -> dict[str, Any]:
        """(h_last . g) strength r at the positions of the prompt."""
        return {"resid": edit(add=self.add, gate=gate, stop=start + 1, read=self.read)}


def null_space_gate(
    benign: Float[np.ndarray, "n D"], malicious: Float[np.ndarray, "m D"], share: float
) -> Float[np.ndarray, " D"]:
    """g = P pinv(X^T X + 10 P^T P) X^T 1, float64."""
    b, m = benign.astype(np.float64), malicious.astype(np.float64)
    _, vectors = np.linalg.eigh(b.T @ b)  # in rising order of eigenvalues
    q = vectors[:, : int(len(vectors) * share)]
    # Within the span of Q, where P is the identity: X^T X + 10 P^T P = Q (Z^T Z + 10) Q^T with Z = H_m Q.
    z = m @ q
    return q @ np.linalg.solve(z.T @ z + 10 * np.eye(q.shape[1]), z.sum(0))


def alphasteer(evidence: Evidence, shares: Mapping[int, float], strength: float) -> AlphaSteer:
    """The rule for the blocks of `shares`, from the safe and harmful prompts of `evidence`.

    r is the mean state of harmful prompts that are refused less that of those that are answered; where none is
    answered, less that of safe answered ones (ours). Raises ValueError for block 0 and blocks that the model lacks.
    """
    if wrong := [layer for layer in shares if not 1 <= layer < evidence.layers]:
        raise ValueError(f"AlphaSteer steers what enters blocks 1 to {evidence.layers - 1}; got {wrong[0]}")
    answers = evidence.harmful & ~evidence.refused
    answered = evidence.at_end[answers] if answers.any() else evidence.states(False, False)
    refusal = mean_difference(evidence.states(True, True), answered)
    add, read = np.zeros_like(refusal), np.zeros_like(refusal)
    for layer, share in shares.items():
        before = layer - 1
        add[before] = strength * refusal[before]
        read[before] = null_space_gate(evidence.states(False)[:, before], evidence.states(True)[:, before], share)
    return AlphaSteer(jnp.asarray(add), jnp.asarray(read))
