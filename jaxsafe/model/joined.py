"""Rows that begin alike as one row: the tokens that they begin with once, and behind these the slots of every row.

Only attention tells the rows apart; norms, maps and MLP go over J tokens, of which none is there twice.

Axes: B batch, P tokens that all rows begin with, R slots of a row behind P, T = P + R, J = P + B R, N heads,
K kv_heads, H head_dim, f a head's features or one
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxsafe.model.attention import Queries, Slots
from jaxsafe.model.blockwise import Scaling


@flax.struct.dataclass
class JoinedQueries:
    """The queries of a joined row and what they may see; used as `Queries`, without a cache.

    first: those of the shared tokens
    rest: those of the rows behind them
    held: which shared token a row holds in each of its first P slots, one-hot; a row that is shorter than T holds
        padding in some, of which nothing is seen, and the others again among its R slots
    """

    first: Queries
    rest: Queries
    held: Float[Array, "B P P"]

    @property
    def positions(self) -> Int[Array, "1 J"]:
        """Those of all tokens."""
        return joined(self.first.positions, self.rest.positions)

    def attend(
        self,
        q: Float[Array, "1 J N H"],
        k: Float[Array, "1 K J H"],
        v: Float[Array, "1 K J H"],
        window: int | Int[Array, ""] | None,
        scaling: Scaling,
    ) -> Float[Array, "1 J N*H"]:
        """As `attention.attend`: shared tokens see one another, and every row sees them and itself."""
        B, P = self.held.shape[:2]
        first = self.first.attend(q[:, :P], k[:, :, :P], v[:, :, :P], window, scaling)
        rest = self.rest.attend(apart(q, B, P), self._seen(k), self._seen(v), window, scaling)
        return joined(first, rest)

    def _seen(self, keys: Float[Array, "1 K J H"]) -> Float[Array, "B K T H"]:
        """The keys, or values, of all slots of every row."""
        (B, P), K, H = self.held.shape[:2], keys.shape[1], keys.shape[3]
        held = jnp.einsum("bps,ksh->bkph", self.held.astype(keys.dtype), keys[0, :, :P])
        rest = keys[0, :, P:].reshape(K, B, -1, H).swapaxes(0, 1)
        return jnp.concatenate([held, rest], axis=2)


@flax.struct.dataclass
class JoinedSlots:
    """Where the tokens of a joined row are: used as `Slots`.

    valid: which slots of the rows hold a token
    shared: P
    """

    valid: Bool[Array, "B T"]
    shared: int = flax.struct.field(pytree_node=False)

    def queries(self, J: int) -> JoinedQueries:
        """The queries of the `J` tokens."""
        P, (B, T) = self.shared, self.valid.shape
        assert J == P + B * (T - P), f"{J} tokens are not those of {B} rows of {T} slots, {P} of them shared"
        valid = jnp.asarray(self.valid)
        return JoinedQueries(
            first=Slots(jnp.ones((1, P), bool)).queries(P),
            rest=Slots(valid, P).queries(T - P),
            held=jax.nn.one_hot(held_tokens(valid, P), P),
        )


def joined(first: Shaped[Array, "1 P *f"], rest: Shaped[Array, "B R *f"]) -> Shaped[Array, "1 J *f"]:
    """One row of what belongs to the shared tokens, and behind it of what belongs to the rows."""
    return jnp.concatenate([first, rest.reshape(1, -1, *rest.shape[2:])], axis=1)


def apart(whole: Shaped[Array, "1 J *f"], B: int, P: int) -> Shaped[Array, "B R *f"]:
    """Of a joined row what belongs to its `B` rows, without the `P` shared tokens."""
    return whole[0, P:].reshape(B, -1, *whole.shape[2:])


def held_tokens(valid: Bool[Array, "B T"], P: int) -> Int[Array, "B P"]:
    """Which of `P` tokens, that all rows begin with, each of the first `P` slots of a row holds; 0 on padding."""
    first = valid.shape[1] - valid.sum(-1)
    return jnp.maximum(jnp.arange(P)[None] - first[:, None], 0)
