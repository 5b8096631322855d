"""Activations of a forward pass, whole or reduced at the tap.

B batch, T position, L layers, F features of the tap
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxsafe.model.attention import causal_mask, positions_of
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import Edit, Reducer, at, collection, readings
from jaxsafe.model.transformer import Params, Transformer, variables


def capture(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    valid: jax.Array,
    taps: Sequence[str] = ("resid",),
    edits: Mapping[str, Edit] | None = None,
    reduce: Mapping[str, Reducer] | None = None,
) -> dict[str, jax.Array]:
    """{tap: activations} of left-padded `tokens` int32 [B, T] with `valid` bool [B, T].

    A tap inside the blocks gives [L, B, T, F] ("final" gives [B, T, D]). A reducer for a tap, such as
    `At(slots)` or `SquareSum(weight)`, is applied inside the scan over layers, so that only what it
    returns is ever stacked. Pure and jittable (`config` and `taps` static). Raises ValueError for an
    unknown tap.
    """
    collections = variables(params, edits) | {"reducers": collection(reduce, "reduce")}
    mask = causal_mask(jnp.arange(tokens.shape[1]), valid, config.window)
    _, state = Transformer(config).apply(
        collections,
        tokens,
        positions_of(valid),
        mask,
        last=0,
        capture_intermediates=at(*taps),
        mutable=["intermediates"],
    )
    return readings(state["intermediates"])
