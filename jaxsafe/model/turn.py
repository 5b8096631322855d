"""An edit that turns what passes a tap toward a vector and keeps its length.

B batch, T query position, L layers, F features at the tap
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TINY = 1e-12


@flax.struct.dataclass
class Turn:
    """x <- |x| unit(unit(x) + (1 + max(0, -cos(x, toward))) strength unit(toward)), at every position.

    What points away from `toward` is turned up to twice as far. As in an `Edit`, fields hold one entry a layer, and a
    tap sees its own, without the leading L; a strength of zero is the identity.
      toward:   [L, F]
      strength: [L]
    """

    toward: Float[Array, "*L F"]
    strength: Float[Array, "*L"]

    def __call__(self, x: Float[Array, "B T F"], positions: Int[Array, "B T"]) -> Float[Array, "B T F"]:
        """`x` as a tap passes it on."""
        wide = x.astype(jnp.float32)
        length = jnp.linalg.norm(wide, axis=-1, keepdims=True)
        unit = wide / jnp.maximum(length, TINY)
        toward = self.toward.astype(jnp.float32)
        toward = (toward / jnp.maximum(jnp.linalg.norm(toward), TINY))[None, None]
        away = jnp.maximum(0, -jnp.sum(unit * toward, axis=-1, keepdims=True))
        turned = unit + (1 + away) * self.strength * toward
        turned = turned / jnp.maximum(jnp.linalg.norm(turned, axis=-1, keepdims=True), TINY)
        return jnp.where(self.strength == 0, x, (length * turned).astype(x.dtype))
