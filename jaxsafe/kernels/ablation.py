"""A direction taken out of everything that a model writes to its residual stream: while it runs, or in its weights.

Directional ablation (Arditi et al., arXiv 2406.11717). Where a norm with scale w stands between a map and the stream,
r . (w * x / rms(x)) is (w * r) . x / rms(x): the map has to lose w * r for the stream to be free of r.

L layers, D embed, V vocab, I inputs of a map in a row
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafe.kernels.steering import unit
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import Edit, edit
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import flatten, nest, weights

WRITERS = {"o": "attn_post_norm", "down": "mlp_post_norm"}
"""The maps that write to the stream, each with the norm behind it where a family has one."""


def written_directions(
    config: ModelConfig, params: Params, direction: Float[Array, " D"]
) -> dict[str, Float[Array, "L D"]]:
    """{tap: unit vectors} that the outputs of "embed" ([1, D]), "o" and "down" lose, so that the stream has none of
    `direction`."""
    r = jnp.asarray(direction, jnp.float32)
    out = {"embed": unit(r[None])}
    for name, norm in WRITERS.items():
        w = jnp.ones((config.layers, config.embed))
        if f"layers/{norm}" in weights(config):
            w = params["layers"][norm].astype(jnp.float32) + (1.0 if config.norm == "plus_one" else 0.0)
        out[name] = unit(w * r[None])
    return out


def ablation(config: ModelConfig, params: Params, direction: Float[Array, " D"]) -> dict[str, Edit]:
    """The edits under which the residual stream has no component along `direction`."""
    return {tap: edit(ablate=u) for tap, u in written_directions(config, params, direction).items()}


def orthogonalised(
    config: ModelConfig, params: Params, direction: Float[Array, " D"]
) -> tuple[ModelConfig, dict[str, Any]]:
    """The model whose weights do what `ablation` does, with its configuration.

    A tied head is untied first: it keeps the embedding that it had, since it reads what the last norm makes of the
    stream, which is not orthogonal to `direction`.
    """
    flat = dict(flatten(params))
    if config.tied:
        config, flat["unembed"] = dataclasses.replace(config, tied=False), flat["embed"].T
    for tap, u in written_directions(config, params, direction).items():
        paths = ("embed",) if tap == "embed" else (f"layers/{tap}", f"layers/{tap}_bias")
        for path in (path for path in paths if path in flat):
            flat[path] = _without(flat[path], u[0] if tap == "embed" else u)
    return config, nest(flat)


def _without(weight: Float[Array, "... D"], u: Float[Array, "*L D"]) -> Float[Array, "... D"]:
    """`weight`, whose last axis is what it writes, without its part along `u`; in float32, of its own dtype."""
    u = u.reshape(*u.shape[:-1], *[1] * (weight.ndim - u.ndim), -1)
    wide = weight.astype(jnp.float32)
    return (wide - jnp.sum(wide * u, -1, keepdims=True) * u).astype(weight.dtype)
