"""Which weights: exact selections of the highest or lowest scores, and what masks do to parameters.

Scores are trees of float32 {"layers": {"q": [L, *inputs, *outputs], ...}} over some or all linear maps of the
blocks, masks are boolean trees of the same structure. Nothing is sorted or gathered: a threshold is found bit by
bit from counts, so that scores spread over devices cost a few small sums.

L layers, I input columns and O output rows of a map seen as the matrix [out, in]
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import TABLE, Weight, flatten, layer_shape, linear_maps, nest, shardings, sizes

PER = ("row", "matrix", "model")
"""What is compared: the entries of one output row, of one matrix [out, in], or of all maps and layers."""

Scores = Mapping[str, Any]
"""A tree of float32 {"layers": {"q": [L, *I, *O], ...}} over some or all linear maps of the blocks."""
Mask = Mapping[str, Any]
"""A boolean tree of the same structure."""


def top(config: ModelConfig, scores: Scores, fraction: float, per: str = "matrix") -> dict[str, Any]:
    """True at the highest scores: of each group, int(size * fraction) entries exactly.

    Ties go to the entry that comes first: in the row-major order of the matrix [out, in], then by layer, then in
    the order of the weight table. Counts are computed on the host and are data of the compiled program, so another
    `fraction` compiles nothing. Inside another jit `fraction` must be a number and `per` "row" or "matrix".
    Raises ValueError for a fraction outside [0, 1], an unknown `per`, an unknown map, another shape, and NaN.
    """
    return _select(config, scores, fraction, per, lowest=False)


def bottom(config: ModelConfig, scores: Scores, fraction: float, per: str = "matrix") -> dict[str, Any]:
    """True at the lowest scores; counts, ties and errors as in `top`."""
    return _select(config, scores, fraction, per, lowest=True)


def n_of_m(config: ModelConfig, scores: Scores, n: int, m: int, lowest: bool = True) -> dict[str, Any]:
    """True at the `n` lowest (or highest) scores of each `m` consecutive input columns of each row, ties to the first.

    Raises ValueError for a map whose input columns `m` does not divide, for n outside [0, m], and for NaN.
    """
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"{n}:{m} selects nothing that exists; n:m needs 0 <= n <= m and m >= 1")
    _check_values(config, scores)
    for path, weight, _ in _maps(config, scores):
        columns = _columns(config, weight)
        if columns % m:
            raise ValueError(f"{path!r} has {columns} input columns, which blocks of {m} do not fill")
    return _in_blocks(config, scores, jnp.int32(n), m, lowest)


def set_difference(
    config: ModelConfig, safety: Scores, utility: Scores, q: float, p: float, per: str = "matrix"
) -> dict[str, Any]:
    """True where a weight is among the top `q` for safety and not among the top `p` for utility; both fractions.

    Wei et al. (ICML 2024, arXiv 2402.05162), set difference; `per="matrix"` is what their code does, "row" their text.
    """
    wanted, spared = top(config, safety, q, per), top(config, utility, p, per)
    return jax.tree.map(lambda a, b: a & ~b, wanted, spared)


@functools.partial(jax.jit, static_argnames=("config", "per", "lowest"))
def largest(
    config: ModelConfig,
    scores: Scores,
    counts: Mapping[str, Int[Array, " L"]],
    per: str = "matrix",
    lowest: bool = False,
) -> dict[str, Any]:
    """True at the `counts` largest (or smallest) scores of each group, ties to the first. Pure and jittable.

    `counts` holds int32 [L] by path, e.g. {"layers/q": [L]}: how many of each matrix or, with `per` "row", of each
    of its rows; none may exceed the size of the group.
    """
    out = {}
    for path, weight, leaf in _maps(config, scores):
        count = jnp.reshape(counts[path], (config.layers, *[1] * (leaf.ndim - 1)))
        out[path] = _largest(_key(leaf, lowest), count, _group(weight, per))
    return nest(out)


@functools.partial(jax.jit, static_argnames=("config", "lowest"))
def tally(
    config: ModelConfig, scores: Scores, threshold: UInt32[Array, ""], lowest: bool
) -> tuple[Int[Array, "M L"], Int[Array, "M L"]]:
    """How many keys of each matrix lie above `threshold`, and how many at it; int32 [maps, L] in the table's order."""
    keys = [_key(leaf, lowest) for _, _, leaf in _maps(config, scores)]
    return jnp.stack([_per_layer(k > threshold) for k in keys]), jnp.stack([_per_layer(k == threshold) for k in keys])


def _select(config: ModelConfig, scores: Scores, fraction: float, per: str, lowest: bool) -> dict[str, Any]:
    if per not in PER:
        raise ValueError(f"per {per!r} is not known; use one of {', '.join(PER)}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction} does not lie in [0, 1]")
    _check_values(config, scores)
    maps = _maps(config, scores)
    if per == "model":
        count = int(sum(math.prod(leaf.shape) for _, _, leaf in maps) * fraction)
        return largest(config, scores, _shares(config, scores, count, lowest), "matrix", lowest)
    counts = {}
    for path, weight, leaf in maps:
        size = _columns(config, weight) if per == "row" else math.prod(leaf.shape[1:])
        counts[path] = np.full(config.layers, int(size * fraction), np.int32)
    return largest(config, scores, counts, per, lowest)


def _shares(config: ModelConfig, scores: Scores, count: int, lowest: bool) -> dict[str, np.ndarray]:
    """How many of the `count` largest scores of the model lie in each matrix, int32 [L] by path.

    Billions of entries overflow int32, the widest integer on a device by default. Those of one matrix do not: each
    step brings the counts of the matrices to the host, a few hundred numbers, and adds them there in int64.
    """

    def reach(threshold: int) -> tuple[np.ndarray, np.ndarray]:
        above, ties = jax.device_get(tally(config, scores, np.uint32(threshold), lowest))
        return above.astype(np.int64), ties.astype(np.int64)

    threshold = 0
    for bit in reversed(range(32)):
        above, ties = reach(threshold | 1 << bit)
        if above.sum() + ties.sum() >= count:
            threshold |= 1 << bit
    above, ties = reach(threshold)
    taken = np.minimum(np.cumsum(ties), count - above.sum())
    shares = above + np.diff(taken, prepend=0).reshape(above.shape)
    return {path: row.astype(np.int32) for (path, _, _), row in zip(_maps(config, scores), shares, strict=True)}


@functools.partial(jax.jit, static_argnames=("config", "m", "lowest"))
def _in_blocks(config: ModelConfig, scores: Scores, n: jax.Array, m: int, lowest: bool) -> dict[str, Any]:
    out = {}
    for path, weight, leaf in _maps(config, scores):
        blocks = leaf.reshape(config.layers, -1, m, *sizes(config, weight.outputs))
        out[path] = _largest(_key(blocks, lowest), n, axes=(2,)).reshape(leaf.shape)
    return nest(out)


def _key(scores: jax.Array, lowest: bool = False) -> jax.Array:
    """uint32 in the order of the float32 `scores` (or in the reverse order), both zeros equal."""
    sign = jnp.uint32(1 << 31)
    bits = jax.lax.bitcast_convert_type(jnp.asarray(scores, jnp.float32), jnp.uint32)
    bits = jnp.where(bits == sign, 0, bits)
    key = jnp.where(bits >= sign, ~bits, bits | sign)
    return ~key if lowest else key


def _largest(key: jax.Array, count: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """True at the `count` largest of `key` along `axes`; ties go to the first, `axes` read as row-major."""

    def total(flags: jax.Array) -> jax.Array:
        return jnp.sum(flags, axes, dtype=jnp.int32, keepdims=True)

    size = math.prod(key.shape[axis] for axis in axes)
    shape = tuple(1 if axis in axes else length for axis, length in enumerate(key.shape))
    position = jnp.uint32(0)
    for axis in axes:
        position = position * key.shape[axis] + jax.lax.broadcasted_iota(jnp.uint32, key.shape, axis)

    threshold = _greatest(32, shape, lambda t: total(key >= t) >= count)
    above, ties = key > threshold, key == threshold
    quota = count - total(above)
    end = jax.lax.cond(
        jnp.any(total(ties) > quota),
        lambda: _greatest(size.bit_length(), shape, lambda p: total(ties & (position < p)) <= quota),
        lambda: jnp.full(shape, size, jnp.uint32),
    )
    return above | (ties & (position < end))


def _greatest(bits: int, shape: tuple[int, ...], holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The greatest uint32 of so many `bits` for which `holds`, which is true of 0 and ever false once it is false."""

    def step(i: jax.Array, value: jax.Array) -> jax.Array:
        candidate = value | jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32)
        return jnp.where(holds(candidate), candidate, value)

    return jax.lax.fori_loop(0, bits, step, jnp.zeros(shape, jnp.uint32))


def _group(weight: Weight, per: str) -> tuple[int, ...]:
    """The axes of a leaf [L, *inputs, *outputs] that are compared, slowest first as in the matrix [out, in]."""
    end = 1 + len(weight.inputs)
    inputs, outputs = tuple(range(1, end)), tuple(range(end, end + len(weight.outputs)))
    return inputs if per == "row" else outputs + inputs


def _columns(config: ModelConfig, weight: Weight) -> int:
    return math.prod(sizes(config, weight.inputs))


def _maps(config: ModelConfig, tree: Scores) -> list[tuple[str, Weight, Any]]:
    """(path, weight, leaf) of the maps of `tree` in the table's order; refuses other names and shapes."""
    flat, table = flatten(tree), linear_maps(config)
    if unknown := sorted(flat.keys() - table.keys()):
        raise ValueError(f"{unknown[0]!r} is no linear map of a block; those are {list(table)}")
    for path, leaf in flat.items():
        expected = (config.layers, *layer_shape(config, table[path]))
        if leaf.shape != expected:
            raise ValueError(f"{path!r} has shape {tuple(leaf.shape)}; the config asks {expected}")
    return [(path, weight, flat[path]) for path, weight in table.items() if path in flat]


def _check_values(config: ModelConfig, scores: Scores) -> None:
    """Raises ValueError where a score is NaN; values that are being traced are not known and pass."""
    known = {path: leaf for path, _, leaf in _maps(config, scores) if not isinstance(leaf, jax.core.Tracer)}
    for path, found in jax.device_get(_has_nan(known)).items():
        if found:
            raise ValueError(f"the scores of {path!r} hold NaN, which has no place in an order")


@jax.jit
def _has_nan(tree: Scores) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: jnp.isnan(leaf).any(), tree)


def _per_layer(flags: Bool[Array, "L ..."]) -> Int[Array, " L"]:
    """The number of True in each layer, int32 [L]."""
    return jnp.sum(flags, range(1, flags.ndim), dtype=jnp.int32)


# Scores that need no data


def magnitude(params: Params) -> dict[str, Any]:
    """|W| of the linear maps that `params` hold, float32."""
    return nest({path: jnp.abs(leaf.astype(jnp.float32)) for path, leaf in _linear(params).items()})


def weight_difference(params: Params, base: Params) -> dict[str, Any]:
    """|W - W_base| of the linear maps, float32. Raises ValueError where the two models differ in shape."""
    out, other = {}, _linear(base)
    for path, leaf in _linear(params).items():
        if leaf.shape != other[path].shape:
            raise ValueError(f"{path!r} has shape {leaf.shape}; that of the base model has {other[path].shape}")
        out[path] = jnp.abs(leaf.astype(jnp.float32) - other[path].astype(jnp.float32))
    return nest(out)


def random_scores(config: ModelConfig, seed: int, mesh: Mesh | None = None) -> dict[str, Any]:
    """Scores uniform in [0, 1); laid out on `mesh` as the parameters are, the same values on any."""
    layout = flatten(shardings(config, mesh)) if mesh is not None else {}
    return nest({path: _drawn(config, path, seed, layout.get(path)) for path in linear_maps(config)})


def random_like(config: ModelConfig, mask: Mask, seed: int) -> dict[str, Any]:
    """A random mask that holds, in each layer of each map, as many True as `mask` does."""
    counts = {path: _per_layer(jnp.asarray(leaf)) for path, _, leaf in _maps(config, mask)}
    drawn = {path: _drawn(config, path, seed, getattr(flatten(mask)[path], "sharding", None)) for path in counts}
    return largest(config, nest(drawn), counts)


def random_of_norm(config: ModelConfig, mask: Mask, changes: Scores, seed: int) -> dict[str, Any]:
    """A random mask whose `changes` have, in each layer of each map, the norm of those where `mask` is True.

    changes: float32, by how much each weight would change, as `magnitude` and `weight_difference` have it. Weights are
    drawn until the next one would exceed the norm.
    """
    out = {}
    for path, _, leaf in _maps(config, mask):
        keys = _drawn(config, path, seed, getattr(leaf, "sharding", None), jax.random.bits)
        out[path] = _up_to(keys, jnp.square(flatten(changes)[path]), leaf)
    return nest(out)


@jax.jit
def _up_to(keys: UInt32[Array, "L ..."], energy: Float[Array, "L ..."], mask: Bool[Array, "L ..."]) -> jax.Array:
    """True at the lowest `keys` of each layer, as many as have no more energy together than those of `mask`."""

    def total(where: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(where, energy, 0), range(1, keys.ndim), keepdims=True)

    wanted = total(mask)
    return keys < _greatest(32, wanted.shape, lambda key: total(keys < key) <= wanted)


def _drawn(config: ModelConfig, path: str, seed: int, sharding: Any, draw: Any = jax.random.uniform) -> jax.Array:
    table = linear_maps(config)
    key = jax.random.fold_in(jax.random.key(seed), list(table).index(path))
    shape = (config.layers, *layer_shape(config, table[path]))
    return jax.jit(draw, static_argnums=1, out_shardings=sharding)(key, shape)


def _linear(params: Params) -> dict[str, Any]:
    flat = flatten(params)
    return {w.path: flat[w.path] for w in TABLE if w.linear and w.stacked and w.path in flat}


# Masks


def apply_mask(params: Params, mask: Mask, base: Params | None = None) -> dict[str, Any]:
    """`params` with zero, or the weight of `base`, where `mask` is True; leaves outside of `mask` are the same arrays.

    Raises ValueError for a mask of weights that `params` or `base` lack, or of another shape.
    """
    flat, other = flatten(params), flatten(base) if base is not None else None
    out = dict(flat)
    for path, where in flatten(mask).items():
        for tree in (flat, other) if other is not None else (flat,):
            found = tree[path].shape if path in tree else "no such weight"
            if found != where.shape:
                raise ValueError(f"the mask holds {path!r} of shape {where.shape}; the parameters have {found}")
        weight = flat[path]
        out[path] = jnp.where(where, 0 if other is None else other[path].astype(weight.dtype), weight)
    return nest(out)


def sparsity(mask: Mask) -> float:
    """The share of True among all entries of `mask`."""
    true = sum(int(n.astype(np.int64).sum()) for n in _true(mask).values())
    return true / sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(mask))


def layer_shares(mask: Mask) -> dict[str, Float[np.ndarray, " L"]]:
    """The share of True in each layer of each map, float64 [L] by the map's name, e.g. "q"."""
    flat = flatten(mask)
    return {path.split("/")[-1]: n / math.prod(flat[path].shape[1:]) for path, n in _true(mask).items()}


def jaccard(a: Mask, b: Mask) -> dict[str, Float[np.ndarray, " L"]]:
    """|A and B| / |A or B| of two masks in each layer of each map, float64 [L] by the map's name, e.g. "q".

    Two empty sets are equal, so theirs is 1. Raises ValueError for masks of different maps or shapes.
    """
    shapes = [{path: leaf.shape for path, leaf in flatten(tree).items()} for tree in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"masks of different maps have no overlap to measure: {shapes[0]} and {shapes[1]}")
    both, either = (_true(jax.tree.map(join, a, b)) for join in (jnp.logical_and, jnp.logical_or))
    return {path.split("/")[-1]: np.where(n == 0, 1.0, both[path] / np.maximum(n, 1)) for path, n in either.items()}


def _true(mask: Mask) -> dict[str, np.ndarray]:
    return jax.device_get({path: _per_layer(jnp.asarray(leaf)) for path, leaf in flatten(mask).items()})
