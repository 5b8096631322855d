"""A soft prompt: vectors in place of the embeddings of some first tokens of every row.

B batch, T query position, P tokens of the soft prompt, D embed
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class SoftPrompt:
    """What enters the first block at positions first <= p < first + P; an edit of the tap "embed", as `Edit` is one.

    Its fields lead with an axis of one entry, as those of every edit outside the blocks.
      vectors: [1, P, D]
      first:   [1] a position, counted without padding, the same in all rows
    """

    vectors: Float[Array, "*one P D"]
    first: Int[Array, "*one"]

    def __call__(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """`x` as the tap passes it on."""
        number = positions - self.first
        inside = (number >= 0) & (number < self.vectors.shape[0])
        vectors = self.vectors.astype(x.dtype)[jnp.clip(number, 0, self.vectors.shape[0] - 1)]
        return jnp.where(inside[..., None], vectors, x)


def soft_prompt(vectors: Float[Array, "P D"], first: int) -> SoftPrompt:
    """A `SoftPrompt` of these vectors from position `first` on."""
    return SoftPrompt(jnp.asarray(vectors)[None], jnp.asarray([first], jnp.int32))
