"""The blocks of a model, one at a time: for passes that do not treat all of them alike.

Axes: B batch, T slots, L layers, D embed
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafe.model.attention import Queries, Slots
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.taps import at, block_readings, collection
from jaxsafe.model.transformer import Block, Edits, Kind, Params, Turns, all_turns, layer_kinds
from jaxsafe.model.weights import flatten, linear_maps, nest


@flax.struct.dataclass
class Blocks:
    """What all blocks of a pass over texts have in common, and what sets each apart.

    edits: those of the taps inside, the same for every block.
    """

    kinds: Kind
    queries: Queries
    turns: Turns
    edits: Mapping[str, Any]
    config: ModelConfig = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, config: ModelConfig, valid: Bool[Array, "B T"], edits: Edits = None) -> "Blocks":
        """The blocks over left-padded texts, of which `valid` are no padding."""
        T = valid.shape[1]
        queries = Slots(valid).queries(T)
        inside = collection(edits, "edit").get("layers", {})
        return cls(layer_kinds(config, T), queries, all_turns(config, queries.positions), inside, config)

    def run(
        self,
        weights: Params,
        layer: int | Int[Array, ""],
        x: Float[Array, "B T D"],
        taps: tuple[str, ...] = (),
        **collections: Any,
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "..."]]]:
        """The residual stream after the block of number `layer` and `weights` (no layer axis), and what `taps` read.

        `collections`: "reducers" and "perturbations" of this block.
        """
        kind = jax.tree.map(lambda of_all: of_all[layer], self.kinds)
        given = {"params": weights, "edits": self.edits} | collections
        options: dict[str, Any] = {"capture_intermediates": at(*taps), "mutable": ["intermediates"]}
        carry = (x, None, jnp.int32(0))
        ((x, _, _), _), state = Block(self.config).apply(given, carry, kind, self.queries, self.turns, **options)
        return x, block_readings(state.get("intermediates", {}))


def layer_of(params: Params, layer: int | Int[Array, ""]) -> dict[str, Any]:
    """The weights of one block, without the layer axis; `layer` may be traced."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), dict(params["layers"]))


def range_of(config: ModelConfig, params: Params, layers: LayerRange) -> tuple[ModelConfig, dict[str, Any]]:
    """(configuration, weights) of some blocks, all in a tree like that of a model of so many layers.

    Scores, selection and removal of ranks apply to it as they do to a whole model. It is not one that runs: what sets
    its layers apart from others is left out.
    """
    few = {"layers": jax.tree.map(lambda a: a[layers.slice], dict(params["layers"]))}
    return dataclasses.replace(config, layers=len(layers)), few


def with_ranges(
    config: ModelConfig, params: Params, changed: Iterable[tuple[LayerRange | None, Params]]
) -> dict[str, Any]:
    """`params` with other linear maps in the layers of each (range, weights as of `range_of`).

    These are written into one copy of the maps, so that of what is changed no second one exists.
    """
    flat = dict(flatten(params))
    flat |= {path: jnp.copy(flat[path]) for path in linear_maps(config)}
    for layers, few in changed:
        assert layers is not None, "a part has layers"
        for path in linear_maps(config):
            flat[path] = _put(flat[path], flatten(few)[path], layers.first)
    return nest(flat)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Float[Array, "L ..."], few: Float[Array, "n ..."], first: Int[Array, ""]) -> Float[Array, "L ..."]:
    return jax.lax.dynamic_update_slice_in_dim(stack, few, first, 0)
