"""Taps: named points of the forward pass, written through `edits` and read through `capture_intermediates`.

Edits and reducers are pytrees of arrays, so another vector, strength, gate or position is other data for the
same compiled program.

Axes: B batch, T query position, L layers, F features at the tap, P positions read
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxsafe.model.products import transposed

TAPS = ("attn_in", "q", "k", "v", "heads", "o", "attn_out", "mlp_in", "mlp_hidden", "down", "mlp_out", "resid")
"""Taps inside every block: normed input of attention; outputs of the maps q, k and v, features of all heads in a row,
before norm and rotation; input of o, output of o, what attention adds to the residual stream (the output of o, behind
its norm where a family has one there), normed input of the MLP, input of down, output of down, what the MLP adds (as
with attention), and the residual stream after the block. Where no norm stands before a map, its input is the stream.
Inputs of maps are of the model's dtype, all else of that of its stream."""
EMBED, FINAL = "embed", "final"
OUTSIDE = (EMBED, FINAL)
"""The taps outside the blocks: what enters the first one, and what the unembedding reads, after the last norm."""

# Modules share names with parameters, and these taps are called like the maps that feed them.
MODULES = {name: f"{name}_tap" if name in ("embed", "q", "k", "v", "o", "down") else name for name in (*TAPS, *OUTSIDE)}


@flax.struct.dataclass
class Edit:
    """x <- x + gate * (add - (x . ablate) ablate) at positions start <= p < stop. Zero vectors are the identity.

    Fields hold one entry a layer (one in all at "embed" and "final"); a tap sees its own, without the leading L.
      add:    [L, F] vector added, its strength included
      ablate: [L, F] unit direction removed, or zero
      gate:   [L, B] or [L, 1] what each row takes of the edit: 1 whole, 0 nothing, -1 the opposite
      start:  [L, B] or [L, 1] first position (counted without padding) that is edited
      stop:   [L, B] or [L, 1] the first one behind these; None edits all from `start` on
      above:  [L] ablation is one-sided: of x . ablate only what exceeds this is removed; None removes all
      read:   [L, F] the gate is multiplied by x . read, x being the row's state at position stop - 1, as earlier layers
              left it; a pass that does not hold this position is not edited. None leaves the gate alone
    """

    add: Float[Array, "*L F"]
    ablate: Float[Array, "*L F"]
    gate: Float[Array, "*L rows"]
    start: Int[Array, "*L rows"]
    stop: Int[Array, "*L rows"] | None = None
    above: Float[Array, "*L"] | None = None
    read: Float[Array, "*L F"] | None = None

    def __call__(self, x: Float[Array, "B T F"], positions: Int[Array, "B T"]) -> Float[Array, "B T F"]:
        """`x` as a tap passes it on."""
        r = self.ablate.astype(x.dtype)
        along = x @ r
        if self.above is not None:
            along = jax.nn.relu(along - self.above.astype(x.dtype))
        change = self.add.astype(x.dtype)[None, None] - along[..., None] * r[None, None]
        edited = positions >= self.start[:, None]
        if self.stop is not None:
            edited &= positions < self.stop[:, None]
        gate = jnp.where(edited, self._gate(x, positions)[:, None], 0)
        return x + gate[..., None].astype(x.dtype) * change

    def _gate(self, x: Float[Array, "B T F"], positions: Int[Array, "B T"]) -> Float[Array, " rows"]:
        if self.read is None:
            return self.gate
        assert self.stop is not None
        here = positions == self.stop[:, None] - 1
        last = x.shape[1] - 1 - jnp.argmax(here[:, ::-1], axis=1)  # padding in front may count as a position, too
        state = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0].astype(jnp.float32)
        reading = jnp.sum(state * self.read[None], axis=-1)
        return self.gate * jnp.where(here.any(axis=1), reading, 0)


@flax.struct.dataclass
class Both:
    """Two edits of one tap, one after the other."""

    first: Edit
    second: Edit

    def __call__(self, x: Float[Array, "B T F"], positions: Int[Array, "B T"]) -> Float[Array, "B T F"]:
        """`x` as a tap passes it on."""
        return self.second(self.first(x, positions), positions)


@flax.struct.dataclass
class OnData:
    """Changes no number: the rows of what passes are split over the data axis of `mesh`.

    Without it the compiler may split features over that axis instead, and have every device hold all rows.
    """

    mesh: Mesh = flax.struct.field(pytree_node=False)

    def __call__(self, x: Float[Array, "B T F"], positions: Int[Array, "B T"]) -> Float[Array, "B T F"]:
        """`x` as a tap passes it on."""
        spec = PartitionSpec("data", PartitionSpec.UNCONSTRAINED, PartitionSpec.UNCONSTRAINED)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def rows_on_data(mesh: Mesh | None) -> dict[str, OnData] | None:
    """Edits that keep rows split over the data axis of `mesh`, at every tap; None where there is no mesh."""
    return None if mesh is None else dict.fromkeys((*TAPS, *OUTSIDE), OnData(mesh))


def edit(
    add: Float[Array, "L F"] | None = None,
    ablate: Float[Array, "L F"] | None = None,
    gate: Float[Array, " B"] | float = 1.0,
    start: Int[Array, " B"] | int = 0,
    stop: Int[Array, " B"] | None = None,
    above: Float[Array, " L"] | None = None,
    read: Float[Array, "L F"] | None = None,
) -> Edit:
    """An `Edit` of every layer, from the parts that are wanted.

    Raises ValueError when neither `add` nor `ablate` is given, and for `read` without `stop`.
    """
    if add is None and ablate is None:
        raise ValueError("an edit needs add or ablate, a [layers, features] array; both are None")
    if read is not None and stop is None:
        raise ValueError("an edit that reads its gate needs stop, the position behind the one that is read")
    shape_like = add if add is not None else ablate
    assert shape_like is not None
    layers = shape_like.shape[0]

    def per_layer(value: Any, dtype: Any) -> Array:
        row = jnp.atleast_1d(jnp.asarray(value, dtype))
        return jnp.broadcast_to(row, (layers, *row.shape))

    zero = jnp.zeros_like(shape_like)
    return Edit(
        add=jnp.asarray(zero if add is None else add),
        ablate=jnp.asarray(zero if ablate is None else ablate),
        gate=per_layer(gate, jnp.float32),
        start=per_layer(start, jnp.int32),
        stop=None if stop is None else per_layer(stop, jnp.int32),
        above=None if above is None else jnp.asarray(above, jnp.float32),
        read=None if read is None else jnp.asarray(read, jnp.float32),
    )


@flax.struct.dataclass
class At:
    """Reads the given slots."""

    slots: Int[Array, "B P"]

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B P F"]:
        return jnp.take_along_axis(x, self.slots[..., None], axis=1)


def _row_mean(x: Float[Array, "B T F"], counted: Bool[Array, "B T"]) -> Float[Array, "B F"]:
    weight = counted.astype(jnp.float32)
    weight /= jnp.maximum(weight.sum(1, keepdims=True), 1)
    return jnp.einsum("btf,bt->bf", x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)


@flax.struct.dataclass
class AtAndMean:
    """Reads the given slots, and behind them the mean over the slots that are `counted`."""

    slots: Int[Array, "B P"]
    counted: Bool[Array, "B T"]

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B P+1 F"]:
        mean = _row_mean(x, self.counted)
        read = jnp.take_along_axis(x, self.slots[..., None], axis=1).astype(jnp.float32)
        return jnp.concatenate([read, mean[:, None]], axis=1)


@flax.struct.dataclass
class RowMoments:
    """Each row's mean over the slots that are `counted`, and its sum of squares about that mean, in float32."""

    counted: Bool[Array, "B T"]

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B 2 F"]:
        mean = _row_mean(x, self.counted)
        squares = jnp.square(x.astype(jnp.float32) - mean[:, None])
        weight = self.counted.astype(jnp.float32)
        summed = jnp.einsum("btf,bt->bf", squares, weight, precision=jax.lax.Precision.HIGHEST)
        return jnp.stack([mean, summed], axis=1)


@flax.struct.dataclass
class SquareSum:
    """Sums squares over rows and positions, in float32."""

    weight: Float[Array, "B T"]

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, " F"]:
        squares = jnp.square(x.astype(jnp.float32))
        return jnp.einsum("btf,bt->f", squares, self.weight, precision=jax.lax.Precision.HIGHEST)


@flax.struct.dataclass
class Gram:
    """Sums outer products over rows and the last P positions, in float32; those before are not read.

    `weight` is 1 where a position counts and 0 elsewhere. `place` is how the sums lie on devices, if they do: each
    device then makes the products that it holds, from its features of all rows.
    """

    weight: Float[Array, "B P"]
    place: NamedSharding | None = flax.struct.field(pytree_node=False, default=None)

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "F F"]:
        x = x[:, x.shape[1] - self.weight.shape[1] :]
        counted = x * self.weight[..., None].astype(x.dtype)
        # Products of bfloat16 numbers are exact in float32; accelerators would round float32 factors to fewer bits.
        return jnp.matmul(
            transposed(self._side(counted, 0)),
            self._side(x, 1),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    def _side(self, x: Float[Array, "B P F"], side: int) -> Float[Array, "BP F"]:
        """What a device multiplies of `x` for its rows (`side` 0) or columns (1) of the sums."""
        if self.place is not None:
            spec = PartitionSpec(None, None, self.place.spec[side])
            x = jax.lax.with_sharding_constraint(x, NamedSharding(self.place.mesh, spec))
        return x.reshape(-1, x.shape[-1])


Reducer = Callable[[Array], Array]


class Tap(nn.Module):
    """A named identity: `edits` may change what passes, `reducers` what a reading of it holds.

    Inside the blocks the scan hands a tap its layer's entry of an edit; `outside` of them there is one entry.
    """

    outside: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"], positions: Int[Array, "B T"]) -> Float[Array, "B T F"]:
        if self.has_variable("edits", "edit"):
            change: Any = self.get_variable("edits", "edit")
            change = jax.tree.map(lambda a: a[0], change) if self.outside else change
            x = change(x, positions)
        self.read(x)
        return x

    @nn.nowrap
    def _reducer(self) -> Reducer | None:
        return self.get_variable("reducers", "reduce") if self.has_variable("reducers", "reduce") else None

    def read(self, x: Float[Array, "B T F"]) -> Float[Array, "..."]:
        """What `capture_intermediates` stores: `x`, or its reduction."""
        reduce = self._reducer()
        return x if reduce is None else reduce(x)


def tap(name: str) -> Tap:
    """The tap of that name, to be called inside a module."""
    return Tap(name=MODULES[name], outside=name in OUTSIDE)


def check_names(names: Iterable[str]) -> None:
    """Raises ValueError for a name that is no tap's."""
    unknown = sorted(set(names) - MODULES.keys())
    if unknown:
        raise ValueError(f"unknown taps {unknown}; the taps are {[*MODULES]}")


def at(*names: str) -> Callable[[nn.Module, str], bool]:
    """The filter for `capture_intermediates` that reads the taps of these names. Raises ValueError for another."""
    check_names(names)
    modules = {MODULES[name] for name in names}
    return lambda module, method: isinstance(module, Tap) and module.name in modules and method == "read"


def collection(by_tap: Mapping[str, Any] | None, leaf: str) -> dict[str, Any]:
    """{"resid": value} as the tree of a Linen collection, values inside blocks under `layers`.

    Raises ValueError for the name of no tap.
    """
    by_tap = by_tap or {}
    check_names(by_tap)
    tree: dict[str, Any] = {MODULES[name]: {leaf: by_tap[name]} for name in OUTSIDE if name in by_tap}
    inside = {MODULES[name]: {leaf: value} for name, value in by_tap.items() if name in TAPS}
    return tree | ({"layers": inside} if inside else {})


def readings(intermediates: Mapping[str, Any]) -> dict[str, Float[Array, "..."]]:
    """{"resid": [L, B, T, F]} from the `intermediates` collection of an `apply`."""
    return block_readings(intermediates) | block_readings(intermediates.get("layers", {}))


def block_readings(intermediates: Mapping[str, Any]) -> dict[str, Float[Array, "..."]]:
    """{"resid": [B, T, F]} from the `intermediates` collection of one block, or of the taps outside."""
    return {name: intermediates[key]["read"][0] for name, key in MODULES.items() if key in intermediates}
