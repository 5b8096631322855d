"""Sums of some layers alone, for models whose sums of all layers do not fit at once.

A pass goes through the blocks one at a time, and adds what it finds to the sums as it goes. The first layer is traced,
so one program serves every range of as many layers.

B batch (rows), T slots, L layers of the model, n layers that are summed, D embed, F features of a tap
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxsafe.kernels.blocks import Blocks, layer_of
from jaxsafe.kernels.forward import embed
from jaxsafe.kernels.importance import (
    LOGIT_BLOCK,
    Counting,
    add_layer_products,
    head_on_data,
    input_taps,
    sample_losses,
)
from jaxsafe.kernels.likelihood import token_nll
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import Reducer, collection, rows_on_data
from jaxsafe.model.transformer import Params, rms_norm
from jaxsafe.model.weights import flatten, linear_maps, nest, sizes
from jaxsafe.rows import Batch


@flax.struct.dataclass
class LayerSums:
    """Sums of the layers from `first` on, as many as the leading axis of their leaves is long."""

    first: int | Int[Array, ""]
    sums: Mapping[str, Any]

    @property
    def count(self) -> int:
        """n, the number of layers."""
        return len(jax.tree.leaves(self.sums)[0])


def add_reduced(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    reducers: Mapping[str, Reducer],
    sums: LayerSums,
    mesh: Mesh | None = None,
) -> LayerSums:
    """`sums` {tap: [n, F, ...]} plus what the `reducers` make of `batch`; no block behind these layers is run."""
    blocks, taps = Blocks.of(config, jnp.asarray(batch.valid), rows_on_data(mesh)), tuple(reducers)
    reduce = collection(reducers, "reduce")["layers"]
    Carry = tuple[Array, Mapping[str, Array]]

    def below(layer: Array, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return blocks.run(layer_of(params, layer), layer, x)[0]

    def add(i: Array, carry: Carry) -> Carry:
        x, layer = carry[0], sums.first + i
        x, read = blocks.run(layer_of(params, layer), layer, x, taps, reducers=reduce)
        return x, {tap: stack.at[i].add(read[tap]) for tap, stack in carry[1].items()}

    x = jax.lax.fori_loop(0, sums.first, below, embed(config, params, jnp.asarray(batch.tokens)))
    return LayerSums(sums.first, jax.lax.fori_loop(0, sums.count, add, (x, dict(sums.sums)))[1])


def add_snip(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    sums: LayerSums,
    counting: Counting,
    last: int | None = None,
    mesh: Mesh | None = None,
) -> LayerSums:
    """`sums` plus the sum over rows of |dL/dW| of these layers; see `importance.snip_sums`.

    The backward pass is written out: it keeps the inputs of the blocks alone, computes each block once more, and goes
    no further down than the first of these layers, so that activations of one block exist at a time.
    """
    blocks, first, n = Blocks.of(config, jnp.asarray(batch.valid), rows_on_data(mesh)), sums.first, sums.count
    Carry = tuple[Array, dict[str, Array]]

    def up(x: Float[Array, "B T D"], layer: Array) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        return blocks.run(layer_of(params, layer), layer, x)[0], split(x, mesh)

    def down(i: Array, gradient: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        layer = config.layers - 1 - i
        weights = layer_of(params, layer)
        _, pull = jax.vjp(lambda x: blocks.run(weights, layer, x)[0], inputs[layer])
        return pull(gradient)[0]

    def add(i: Array, carry: Carry) -> Carry:
        place = n - 1 - i
        layer = first + place
        weights = layer_of(params, layer)

        def block(x: Array, perturbations: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
            return blocks.run(weights, layer, x, input_taps(config), perturbations=perturbations)

        _, pull, read = jax.vjp(block, inputs[layer], zeros, has_aux=True)
        gradient, of_maps = pull(carry[0])
        of_paths = {path: of_maps[name] for path, name in names.items()}
        return gradient, add_layer_products(config, read, of_paths, carry[1], place, mesh)

    B, T = batch.tokens.shape
    maps = linear_maps(config)
    names = {path: f"{path.split('/')[-1]}_out" for path in maps}
    zeros = {names[path]: jnp.zeros((B, T, *sizes(config, w.outputs)), config.stream_dtype) for path, w in maps.items()}
    x, inputs = jax.lax.scan(up, embed(config, params, jnp.asarray(batch.tokens)), jnp.arange(config.layers))
    gradient = jax.grad(lambda x: _loss(config, params, batch, x, counting, last, mesh))(x)
    gradient = jax.lax.fori_loop(0, config.layers - first - n, down, gradient)
    found = jax.lax.fori_loop(0, n, add, (gradient, flatten(sums.sums)))[1]
    return LayerSums(first, nest(found))


def split(x: Float[Array, "B T D"], mesh: Mesh | None) -> Float[Array, "B T D"]:
    """`x` as it is kept for a backward pass: rows over the data axis of `mesh`, features over its model axis."""
    if mesh is None:
        return x
    features = "model" if x.shape[-1] % mesh.shape["model"] == 0 else None
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("data", None, features)))


def _loss(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    x: Float[Array, "B T D"],
    counting: Counting,
    last: int | None,
    mesh: Mesh | None,
) -> Float[Array, ""]:
    """The summed loss of the rows from the residual stream `x` behind the last block."""
    T = x.shape[1]
    last = T - 1 if last is None else min(last, T - 1)
    states = rms_norm(x[:, T - last - 1 : T - 1], params["norm"], config.norm_eps, config.norm).astype(config.dtype)
    head = head_on_data(config, params, mesh)
    nll = token_nll(config, head, states, jnp.asarray(batch.tokens)[:, T - last :], LOGIT_BLOCK)
    return sample_losses(nll, batch, counting.positions, counting.loss).sum()
