"""One block at a time, from cached block inputs.

B batch, T position, D embed, F features of a tap
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsafe.model.attention import causal_mask, positions_of, rotation
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import Reducer, at
from jaxsafe.model.transformer import Block, Params


@functools.partial(jax.jit, static_argnames=("config", "taps"))
def run_block(
    config: ModelConfig,
    layer: Params,
    x: jax.Array,
    valid: jax.Array,
    taps: tuple[str, ...] = (),
    reduce: Mapping[str, Reducer] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The residual stream [B, T, D] after one block of weights `layer` (no layer axis), and what its taps read.

    `valid` bool [B, T] as in `forward`. One compilation serves every layer.
    """
    positions = positions_of(valid)
    cos, sin = rotation(config.rope, config.head_dim, positions)
    mask = causal_mask(jnp.arange(x.shape[1]), valid, config.window)
    reducers = {name: {"reduce": reducer} for name, reducer in (reduce or {}).items()}
    ((x, _, _), _), state = Block(config).apply(
        {"params": layer, "reducers": reducers},
        (x, None, jnp.int32(0)),
        None,
        cos,
        sin,
        mask,
        positions,
        0,
        capture_intermediates=at(*taps),
        mutable=["intermediates"],
    )
    return x, {name: read["read"][0] for name, read in state.get("intermediates", {}).items()}


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """What enters the first block, [B, T, D]."""
    return params["embed"][tokens]


def layer_of(params: Params, layer: int) -> dict[str, Any]:
    """The weights of one block, without the layer axis."""
    return jax.tree.map(lambda a: a[layer], dict(params["layers"]))
