"""CAST, conditional activation steering (Lee et al., arXiv 2409.05907).

A prompt meets a condition where its mean state is like a condition vector at one layer; only prompts that do (here:
that do not) are steered. The published code decides by the first row of a batch; here each row has its own gate.
Vectors are first principal components of contrastive states; layer and threshold maximise F1 on labelled prompts.
Ours: safe prompts are steered away from refusal, where the paper steers harmful ones toward it.

n prompts, L layers, D embed
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxsafe.kernels.gates import Condition
from jaxsafe.methods.evidence import Evidence
from jaxsafe.methods.gate_fits import score_of


def principal_directions(
    first: Float[np.ndarray, "m L D"], second: Float[np.ndarray, "k L D"]
) -> Float[np.ndarray, "L D"]:
    """The first principal component of both kinds of states about the mean of their two means, by layer.

    Each is a unit vector, turned toward `first`; float32.
    """
    out = []
    for layer in range(first.shape[1]):
        a, b = first[:, layer].astype(np.float64), second[:, layer].astype(np.float64)
        middle = (a.mean(0) + b.mean(0)) / 2
        component = np.linalg.svd(np.concatenate([a, b]) - middle, full_matrices=False)[2][0]
        out.append(component * (1 if component @ (a.mean(0) - b.mean(0)) >= 0 else -1))
    return np.stack(out).astype(np.float32)


def best_f1(scores: Float[np.ndarray, " n"], harmful: Bool[np.ndarray, " n"]) -> tuple[float, float]:
    """The best F1 of the verdict score >= threshold, and that threshold: one of the scores."""
    taken = scores[None] >= scores[:, None]
    f1 = 2 * (taken & harmful).sum(1) / (taken.sum(1) + harmful.sum())
    return max((float(f), float(s)) for f, s in zip(f1, scores, strict=True))


def condition(evidence: Evidence) -> Condition:
    """The condition of the best F1 at telling harmful prompts, over layers, directions and thresholds."""
    harmful = evidence.harmful
    vectors = jnp.asarray(principal_directions(evidence.mean[harmful], evidence.mean[~harmful]))
    best: tuple[float, Condition] | None = None
    for layer in range(evidence.layers):
        here = jnp.asarray(np.arange(evidence.layers) == layer, jnp.float32)
        for sign in (1.0, -1.0):
            one = Condition(vectors, here, jnp.float32(0), jnp.float32(sign))
            scores = score_of(one, evidence)
            f1, threshold = best_f1(scores, harmful)
            if best is None or f1 > best[0]:
                best = f1, one.replace(threshold=jnp.float32(threshold))  # type: ignore[attr-defined]
    assert best is not None
    return best[1]
