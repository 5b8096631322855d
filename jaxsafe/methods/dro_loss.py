"""The probes and the loss of DRO (Zheng et al., arXiv 2401.18018); see `dro`.

n prompts, B batch, D embed, M components
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

WEIGHTS = 1e-2, 1e-3
"""Published, of the term of harm and of that of the other coordinates."""


@flax.struct.dataclass
class Probes:
    """V, float32 [D, M], and the weights [M] of f_r and f_h; intercepts cancel in the loss."""

    basis: Float[Array, "D M"]
    comply: Float[Array, " M"]
    harmless: Float[Array, " M"]


def fit_probes(
    states: Float[np.ndarray, "n D"],
    compliance: Float[np.ndarray, " n"],
    harmless: Bool[np.ndarray, " n"],
    components: int = 4,
) -> Probes:
    """The probes of `states`; `compliance` are shares of answers that comply.

    Raises ValueError where all states are of one kind, or all answers.
    """
    pca = PCA(components, svd_solver="full").fit(states.astype(np.float64))
    at = pca.transform(states.astype(np.float64))
    if harmless.all() or not harmless.any():
        raise ValueError(f"DRO needs harmful and harmless prompts; all {len(harmless)} are of one kind")
    if not 0 < compliance.sum() < len(compliance):
        raise ValueError(f"DRO needs refusals and compliance; {compliance.mean():.0%} of the answers comply")
    # A share is two examples, one of each outcome, weighted by it.
    outcome = np.repeat([True, False], len(at))
    shares = np.concatenate([compliance, 1 - compliance])
    comply = LogisticRegression(max_iter=5000).fit(np.tile(at, (2, 1)), outcome, sample_weight=shares)
    kind = LogisticRegression(max_iter=5000).fit(at, harmless)
    parts = pca.components_.T, comply.coef_[0], kind.coef_[0]
    return Probes(*(jnp.asarray(part, jnp.float32) for part in parts))


def loss(
    probes: Probes,
    states: Float[Array, "B D"],
    textual: Float[Array, "B D"],
    harmless: Float[Array, " B"],
    weights: tuple[float, float] = WEIGHTS,
) -> Float[Array, " B"]:
    """The loss of each prompt from x and x_0; `weights` are those of its second and third term."""
    of_harm, of_rest = weights
    moved = states - textual
    along = jnp.einsum("bd,dm->bm", moved, probes.basis, precision=jax.lax.Precision.HIGHEST)
    rest = jnp.sum(moved**2, -1) - jnp.sum(along**2, -1)
    bce = optax.sigmoid_binary_cross_entropy
    refusal, harm = bce(along @ probes.comply, harmless), bce(along @ probes.harmless, harmless)
    others = max(1, moved.shape[-1] - along.shape[-1])
    return refusal + of_harm * harm + of_rest * rest / others
