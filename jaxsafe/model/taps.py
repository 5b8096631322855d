"""Taps: named points of the forward pass, written through `edits` and read through `capture_intermediates`.

Edits and reducers are pytrees of arrays, so another vector, strength, gate or position is other data for the
same compiled program.

B batch, T query position, L layers, F features at the tap, P positions read
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

TAPS = ("attn_in", "heads", "attn_out", "mlp_in", "mlp_hidden", "mlp_out", "resid")
"""Taps inside every block: normed input of attention, input of o, output of o, normed input of the MLP,
input of down, output of down, and the residual stream after the block."""
FINAL = "final"
"""The tap after the last norm: what the unembedding reads."""


@flax.struct.dataclass
class Edit:
    """x <- x + gate * (add - (x . ablate) ablate) at positions >= start. Zero vectors are the identity.

    Fields hold one entry a layer (one in all at the tap "final"); a tap sees its own, without the leading L.
      add:    [L, F] vector added, its strength included
      ablate: [L, F] unit direction removed, or zero
      gate:   [L, B] or [L, 1] what each row takes of the edit: 1 whole, 0 nothing, -1 the opposite
      start:  [L, B] or [L, 1] first position (counted without padding) that is edited
    """

    add: jax.Array
    ablate: jax.Array
    gate: jax.Array
    start: jax.Array

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """The edited `x` [B, T, F], `positions` int32 [B, T]."""
        r = self.ablate.astype(x.dtype)
        change = self.add.astype(x.dtype) - (x @ r)[..., None] * r
        gate = jnp.where(positions >= self.start[:, None], self.gate[:, None], 0)
        return x + gate[..., None].astype(x.dtype) * change


def edit(
    add: jax.Array | None = None,
    ablate: jax.Array | None = None,
    gate: jax.Array | float = 1.0,
    start: jax.Array | int = 0,
) -> Edit:
    """An `Edit` from the parts that are wanted: `add`, `ablate` [L, F]; `gate`, `start` scalars or [B].

    Raises ValueError when neither `add` nor `ablate` is given.
    """
    if add is None and ablate is None:
        raise ValueError("an edit needs add or ablate, a [layers, features] array; both are None")
    shape_like = add if add is not None else ablate
    assert shape_like is not None
    layers = shape_like.shape[0]

    def per_layer(value: Any, dtype: Any) -> jax.Array:
        row = jnp.atleast_1d(jnp.asarray(value, dtype))
        return jnp.broadcast_to(row, (layers, *row.shape))

    zero = jnp.zeros_like(shape_like)
    return Edit(
        add=jnp.asarray(zero if add is None else add),
        ablate=jnp.asarray(zero if ablate is None else ablate),
        gate=per_layer(gate, jnp.float32),
        start=per_layer(start, jnp.int32),
    )


@flax.struct.dataclass
class At:
    """Reads the given slots: [B, T, F] -> [B, P, F]. Fields: slots int32 [B, P]."""

    slots: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, self.slots[..., None], axis=1)


@flax.struct.dataclass
class WeightedSum:
    """Sums over rows and positions: [B, T, F] -> [F] float32. Fields: weight float32 [B, T]."""

    weight: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("btf,bt->f", x, self.weight, preferred_element_type=jnp.float32)


@flax.struct.dataclass
class SquareSum:
    """Sums squares over rows and positions: [B, T, F] -> [F] float32. Fields: weight float32 [B, T]."""

    weight: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        squares = jnp.square(x.astype(jnp.float32))
        return jnp.einsum("btf,bt->f", squares, self.weight, precision=jax.lax.Precision.HIGHEST)


@flax.struct.dataclass
class Gram:
    """Sums outer products over rows and the last P positions: [B, T, F] -> [F, F] float32.

    Fields: weight float32 [B, P]. Positions before the last P are not read.
    """

    weight: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x[:, x.shape[1] - self.weight.shape[1] :].astype(jnp.float32).reshape(-1, x.shape[-1])
        weighted = x * self.weight.reshape(-1, 1)
        # Accelerators would round float32 factors to fewer bits by default.
        return jnp.einsum("pf,pg->fg", weighted, x, precision=jax.lax.Precision.HIGHEST)


Reducer = Callable[[jax.Array], jax.Array]


class Tap(nn.Module):
    """A named identity: `edits` may change what passes, `reducers` what a reading of it holds."""

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        if self.has_variable("edits", "edit"):
            x = self.get_variable("edits", "edit")(x, positions)
        self.read(x)
        return x

    @nn.nowrap
    def _reducer(self) -> Reducer | None:
        return self.get_variable("reducers", "reduce") if self.has_variable("reducers", "reduce") else None

    def read(self, x: jax.Array) -> jax.Array:
        """What `capture_intermediates` stores: `x` [B, T, F], or its reduction."""
        reduce = self._reducer()
        return x if reduce is None else reduce(x)


def at(*names: str) -> Callable[[nn.Module, str], bool]:
    """The filter for `capture_intermediates` that reads the taps of these names."""
    unknown = sorted(set(names) - {*TAPS, FINAL})
    if unknown:
        raise ValueError(f"unknown taps {unknown}; the taps are {[*TAPS, FINAL]}")
    return lambda module, method: isinstance(module, Tap) and module.name in names and method == "read"


def collection(by_tap: Mapping[str, Any] | None, leaf: str) -> dict[str, Any]:
    """{"resid": value} as the tree of a Linen collection, values inside blocks under `layers`."""
    by_tap = by_tap or {}
    unknown = sorted(by_tap.keys() - {*TAPS, FINAL})
    if unknown:
        raise ValueError(f"unknown taps {unknown}; the taps are {[*TAPS, FINAL]}")
    tree: dict[str, Any] = {}
    inside = {name: {leaf: value} for name, value in by_tap.items() if name != FINAL}
    if inside:
        tree["layers"] = inside
    if FINAL in by_tap:
        # The scan over layers takes the leading axis of an edit away; outside of it that is done here.
        final = by_tap[FINAL]
        tree[FINAL] = {leaf: jax.tree.map(lambda a: a[0], final) if isinstance(final, Edit) else final}
    return tree


def readings(intermediates: Mapping[str, Any]) -> dict[str, jax.Array]:
    """{"resid": [L, B, T, F]} from the `intermediates` collection of an `apply`."""
    blocks = dict(intermediates.get("layers", {}))
    if FINAL in intermediates:
        blocks[FINAL] = intermediates[FINAL]
    return {name: tap["read"][0] for name, tap in blocks.items()}
