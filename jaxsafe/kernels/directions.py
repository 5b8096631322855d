"""Directions through the weights, and models along them: theta + sum_k a_k d_k.

P points, K directions, L layers
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import Weight, flatten, nest, weights

Per = Literal["layer", "filter"]
PER: tuple[Per, ...] = ("layer", "filter")
"""What of a random direction has the norm of the weights: each tensor, or each output of it."""


def random_direction(
    config: ModelConfig, like: Params, seed: int, per: Per = "layer", skip: Sequence[str] = ("norm",)
) -> dict[str, Any]:
    """Gaussian directions whose tensors have the norms of those of `like`, in its dtypes; zero for the kinds in `skip`.

    A tensor is one of the checkpoint's: one layer of a map, a norm or a bias. per "layer": d / |d|_F |theta|_F of each
    tensor, as arXiv 2405.17374 has it, embeddings included and norms left alone; "filter": the same of each output of
    a map and each token's embedding (Li et al., arXiv 1712.09913), a bias being one filter. Drawn in float32; the same
    on every mesh. Raises ValueError for another `per`.
    """
    if per not in PER:
        raise ValueError(f"directions are normalised per {' or '.join(PER)}, got {per!r}")
    table, flat, out = weights(config), flatten(like), {}
    for number, (path, weight) in enumerate(table.items()):
        tensor = flat[path]
        if weight.kind in skip:
            out[path] = jnp.zeros_like(tensor)
            continue
        key = jax.random.fold_in(jax.random.key(seed), number)
        draw = jax.jit(_drawn, static_argnames=("axes", "stacked"), out_shardings=_layout(tensor))
        out[path] = draw(key, tensor, axes=_axes(weight, per, tensor.ndim - weight.stacked), stacked=weight.stacked)
    return nest(out)


def _drawn(key: Array, tensor: Float[Array, "..."], axes: tuple[int, ...], stacked: bool) -> Float[Array, "..."]:
    """A random tensor with the norms of `tensor` over `axes` of one layer."""

    def of_layer(given: tuple[Array, Array]) -> Array:
        key, weight = given
        noise = jax.random.normal(key, weight.shape)
        return (noise / _norm(noise, axes) * _norm(weight, axes)).astype(tensor.dtype)

    if not stacked:
        return of_layer((key, tensor))
    # One layer after another: float32 draws of all of them at once would be twice the weights in bfloat16.
    return jax.lax.map(of_layer, (jax.random.split(key, len(tensor)), tensor))


def _norm(tensor: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    return jnp.sqrt(jnp.sum(jnp.square(tensor.astype(jnp.float32)), axes, keepdims=True))


def _axes(weight: Weight, per: Per, ndim: int) -> tuple[int, ...]:
    """The axes of one layer's array over which norms are taken."""
    if per == "layer" or weight.kind == "bias":
        return tuple(range(ndim))
    return tuple(range(len(weight.inputs))) if weight.linear else (ndim - 1,)


def _layout(tensor: Any) -> Any:
    return getattr(tensor, "sharding", None)


def orthogonal(config: ModelConfig, direction: Params, to: Params) -> dict[str, Any]:
    """`direction` without its part along `to`, tensor by tensor, each brought back to its norm (Gram-Schmidt).

    Orthogonal in every tensor, hence as a whole.
    """
    other = flatten(to)
    return nest(
        {
            path: _orthogonal(tensor, other[path], stacked=weights(config)[path].stacked)
            for path, tensor in flatten(direction).items()
        }
    )


@functools.partial(jax.jit, static_argnames="stacked")
def _orthogonal(tensor: Float[Array, "..."], to: Float[Array, "..."], stacked: bool) -> Float[Array, "..."]:
    axes = tuple(range(int(stacked), tensor.ndim))
    d, t = tensor.astype(jnp.float32), to.astype(jnp.float32)
    along = jnp.sum(d * t, axes, keepdims=True) / jnp.maximum(jnp.sum(t * t, axes, keepdims=True), 1e-30)
    rest = d - along * t
    return (rest * (_norm(d, axes) / jnp.maximum(_norm(rest, axes), 1e-30))).astype(tensor.dtype)


@jax.jit
def difference(params: Params, other: Params) -> Params:
    """The direction from `params` to `other`, float32: at offset 1 lies `other`."""
    return jax.tree.map(lambda a, b: b.astype(jnp.float32) - a.astype(jnp.float32), params, other)


@jax.jit
def moved(params: Params, directions: Sequence[Params], offsets: Float[Array, " K"]) -> Params:
    """`params` moved by `offsets` along `directions`, in the dtype of `params`; summed in float32."""

    def of_tensor(weight: Array, *along: Array) -> Array:
        steps = (a * d.astype(jnp.float32) for a, d in zip(offsets, along, strict=True))
        return sum(steps, weight.astype(jnp.float32)).astype(weight.dtype)

    return jax.tree.map(of_tensor, params, *directions)


def moved_stack(params: Params, directions: Sequence[Params], offsets: Any) -> Params:
    """`moved` to each of the `offsets` [P K]: a tree whose tensors have a leading axis P."""
    return jax.vmap(moved, in_axes=(None, None, 0))(params, tuple(directions), jnp.asarray(offsets, jnp.float32))
