"""Importance of single weights: what Wanda and SNIP (as in Wei et al., arXiv 2402.05162) sum over samples.

Sums are float32, unsigned and additive: those of two halves of the data add up to those of the whole.
Every function here is pure and works on one device's rows; with `axis_name` it adds up over that axis of
`jax.pmap` or `jaxsafe.parallel.per_device`.

B batch (rows), T position, L layers, I inputs and O outputs of a linear map, F features of a tap
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsafe.kernels.forward import Apart, capture, captured, joined_inputs
from jaxsafe.kernels.likelihood import token_nll
from jaxsafe.model.attention import Slots
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.products import transposed
from jaxsafe.model.taps import FINAL, Gram, SquareSum, at, readings, rows_on_data
from jaxsafe.model.transformer import Params, Transformer, variables
from jaxsafe.model.weights import Weight, flatten, linear_maps, nest, partition_spec, sizes, weights
from jaxsafe.rows import Batch

POSITIONS = ("response", "prompt", "all")
LOSSES = ("mean", "sum")
LOGIT_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Counting:
    """Which tokens of a row count, "response", "prompt" or "all", and whether its loss is their "mean" or their "sum".

    "mean" is what the code published with arXiv 2402.05162 does, "sum" the formula in its text.
    """

    positions: str = "response"
    loss: str = "mean"


def counted(batch: Batch, positions: str) -> Any:
    """bool [B, T]: the tokens that count, by `positions`: of the response, of the prompt, or all.

    Raises ValueError for another name.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions {positions!r} is not known; use one of {', '.join(POSITIONS)}")
    chosen = {"response": batch.response, "prompt": batch.valid & ~batch.response, "all": batch.valid}
    return chosen[positions]


def total(tree: Any, axis_name: str | None) -> Any:
    """`tree` added up over the devices of `axis_name`, where there is one."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def input_taps(config: ModelConfig) -> tuple[str, ...]:
    """The taps that feed the linear maps of a block."""
    return tuple(dict.fromkeys(str(w.tap) for w in linear_maps(config).values()))


def gram_taps(config: ModelConfig) -> dict[str, str]:
    """{path of a linear map: the tap whose outer products its directions follow from}.

    They are directions of its outputs, so these serve where they are fewer than the inputs; not where other maps read
    the same inputs, nor behind a bias, which is no part of them.
    """
    maps = linear_maps(config)
    readers = Counter(w.tap for w in maps.values())

    def tap(path: str, w: Weight) -> str:
        fewer = math.prod(sizes(config, w.outputs)) < math.prod(sizes(config, w.inputs))
        alone = readers[w.tap] == 1 and f"{path}_bias" not in weights(config)
        return path.split("/")[-1] if fewer and alone else str(w.tap)

    return {path: tap(path, w) for path, w in maps.items()}


def wanda_sums(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    positions: str = "response",
    axis_name: str | None = None,
    mesh: Mesh | None = None,
) -> dict[str, jax.Array]:
    """{tap: float32 [L, F]} sums of squares of every map's inputs over the counted tokens of `batch`.

    Reduced at the taps, so that no activation is kept. Source: Sun et al., arXiv 2306.11695; counted tokens as
    in arXiv 2402.05162, section 2.1: a position counts by its own (input) token.
    """
    batch = shared_where_uncounted(batch, positions, mesh)
    sums = reduced(config, params, batch, wanda_reducers(config, batch, positions), mesh)
    return total(sums, axis_name)


def shared_where_uncounted(batch: Batch, positions: str, mesh: Mesh | None) -> Batch:
    """`batch`, which shares nothing where what its rows begin with counts or lies on several devices."""
    return batch if positions == "response" and mesh is None else dataclasses.replace(batch, shared=0)


def reduced(
    config: ModelConfig, params: Params, batch: Batch, reducers: Mapping[str, Any], mesh: Mesh | None
) -> dict[str, jax.Array]:
    """What `reducers` make of the slots behind what the rows of a batch share, which is run once."""
    if not batch.shared:
        return capture(config, params, batch.tokens, batch.valid, tuple(reducers), rows_on_data(mesh), reducers)
    behind = {tap: Apart(reducer, len(batch.tokens), batch.shared) for tap, reducer in reducers.items()}
    return captured(config, params, joined_inputs(batch), tuple(behind), reduce=behind)


def wanda_reducers(config: ModelConfig, batch: Batch, positions: str) -> dict[str, SquareSum]:
    """{tap: what makes the sums of `wanda_sums` of one block}."""
    weight = jnp.asarray(counted(batch, positions), jnp.float32)[:, batch.shared :]
    return dict.fromkeys(input_taps(config), SquareSum(weight))


def gram_sums(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    positions: str = "response",
    last: int | None = None,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
) -> dict[str, jax.Array]:
    """{tap: float32 [L, F, F]} sums of outer products at the `gram_taps` over the counted tokens of `batch`.

    `last` (static) is a number of final slots that holds every counted token; only those are multiplied. On a `mesh`
    every device makes the products of its own features (see `gram_spec`), those of all rows.
    """
    batch = shared_where_uncounted(batch, positions, mesh)
    sums = reduced(config, params, batch, gram_reducers(config, batch, positions, last, mesh), mesh)
    return total(sums, axis_name)


def gram_reducers(
    config: ModelConfig, batch: Batch, positions: str, last: int | None = None, mesh: Mesh | None = None
) -> dict[str, Gram]:
    """{tap: what makes the sums of `gram_sums` of one block}."""
    weight = jnp.asarray(counted(batch, positions), jnp.float32)[:, batch.shared :]
    weight = weight if last is None else weight[:, -last:]
    return {
        tap: Gram(weight, None if mesh is None else NamedSharding(mesh, gram_spec(F, mesh)))
        for tap, F in gram_widths(config).items()
    }


def gram_widths(config: ModelConfig) -> dict[str, int]:
    """{tap: F} of the sums of outer products [L, F, F]."""
    maps = linear_maps(config)
    sides = {
        tap: maps[path].inputs if tap == maps[path].tap else maps[path].outputs
        for path, tap in gram_taps(config).items()
    }
    return {tap: math.prod(sizes(config, axes)) for tap, axes in sides.items()}


def gram_spec(F: int, mesh: Mesh) -> PartitionSpec:
    """How outer products [F, F] lie on `mesh`: one side over each axis that divides it."""
    return PartitionSpec(*(axis if F % mesh.shape[axis] == 0 else None for axis in ("data", "model")))


def sample_losses(nll: jax.Array, batch: Batch, positions: str, loss: str) -> jax.Array:
    """Negative log-likelihood (nats) of each row's counted tokens, mean or sum over them, float32 [B].

    `nll` [B, R] is that of each of the last R tokens. Raises ValueError for an unknown `loss`.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is not known; use one of {', '.join(LOSSES)}")
    R = nll.shape[1]
    known = batch.valid[:, -R - 1 : -1]  # the first token of a row is predicted by nothing
    weight = jnp.asarray(counted(batch, positions)[:, -R:] & known, jnp.float32)
    summed = (nll * weight).sum(1)
    return summed if loss == "sum" else summed / jnp.maximum(weight.sum(1), 1)


def inputs_and_output_gradients(
    config: ModelConfig, params: Params, batch: Batch, counting: Counting, last: int | None, mesh: Mesh | None = None
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """{tap: [L, B, T, F]} inputs of the maps, {path: [L, B, T, *outputs]} gradients of the samples' losses there.

    A row's loss depends on no other row, so the gradient of the sum of losses holds every row's own. Logits exist for
    `LOGIT_BLOCK` slots at a time.
    """
    B, T = batch.tokens.shape
    last = T - 1 if last is None else min(last, T - 1)
    names = {path: f"{path}_out" for path in linear_maps(config)}
    shape = {path: (config.layers, B, T, *sizes(config, w.outputs)) for path, w in linear_maps(config).items()}
    zeros = nest({names[path]: jnp.zeros(shape[path], config.stream_dtype) for path in names})

    def summed_loss(perturbations: Any) -> tuple[jax.Array, Any]:
        _, state = Transformer(config, "products").apply(
            variables(params, rows_on_data(mesh)) | {"perturbations": perturbations},
            batch.tokens,
            Slots(batch.valid),
            last=0,
            capture_intermediates=at(*input_taps(config), FINAL),
            mutable=["intermediates"],
        )
        inputs = readings(state["intermediates"])
        states = inputs.pop(FINAL)[:, T - last - 1 : T - 1]
        nll = token_nll(config, head_on_data(config, params, mesh), states, batch.tokens[:, T - last :], LOGIT_BLOCK)
        return sample_losses(nll, batch, counting.positions, counting.loss).sum(), inputs

    gradients, inputs = jax.grad(summed_loss, has_aux=True)(zeros)
    found = flatten(gradients)
    return inputs, {path: found[name] for path, name in names.items()}


def head_on_data(config: ModelConfig, params: Params, mesh: Mesh | None) -> Params:
    """`params` whose unembedding every device of the data axis of `mesh` holds: gathered once, not for every block."""
    if mesh is None:
        return params
    name = "embed" if config.tied else "unembed"
    spec = (a if a == "model" else None for a in partition_spec(config, weights(config)[name], mesh))
    whole = jax.lax.with_sharding_constraint(params[name], NamedSharding(mesh, PartitionSpec(*spec)))
    return {**params, name: whole}


def absolute_products(x: jax.Array, g: jax.Array, start: jax.Array) -> jax.Array:
    """`start` + sum over rows b of |x_b^T g_b|: [B, T, I], [B, T, O], [I, O] -> float32 [I, O].

    x_b^T g_b is the gradient of row b's loss with respect to the map; one row's product exists at a time.
    """

    def add_row(b: jax.Array, so_far: jax.Array) -> jax.Array:
        return so_far + jnp.abs(jnp.matmul(transposed(x[b]), g[b].astype(x.dtype), preferred_element_type=jnp.float32))

    return jax.lax.fori_loop(0, x.shape[0], add_row, start)


def snip_sums(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    sums: Mapping[str, Any],
    counting: Counting = Counting(),
    last: int | None = None,
    axis_name: str | None = None,
) -> dict[str, Any]:
    """`sums` plus, for every linear map, the sum over rows n of |dL_n/dW|; trees like the parameters, float32.

    All layers in one forward and one backward pass that keeps the maps' inputs and output gradients of this
    batch; the per-row gradients are their products, formed and added in place one row and one map at a time.
    `last` (static) is a number of final slots that holds every counted token. Memory: parameters, one tree of sums
    (donate it), activations of the batch. Source: Lee et al., arXiv 1810.02340; arXiv 2402.05162, section 2.1.
    """
    inputs, gradients = inputs_and_output_gradients(config, params, batch, counting, last)
    if axis_name is None:
        return add_products(config, inputs, gradients, sums)
    added = add_products(config, inputs, gradients, jax.tree.map(jnp.zeros_like, sums))
    return jax.tree.map(jnp.add, sums, total(added, axis_name))


def add_products(
    config: ModelConfig,
    inputs: Mapping[str, jax.Array],
    gradients: Mapping[str, jax.Array],
    sums: Mapping[str, Any],
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """`sums` plus the absolute products of every row's `inputs` {tap: [L, B, T, F]} and `gradients` {path: ...}.

    On a `mesh` sums lie as the maps do, and every device makes the products that it holds, those of all rows: for B T
    tokens it receives about 2 B T numbers a feature of its own, where a sum of its own rows would send I O.
    """

    def add_layer(layer: jax.Array, so_far: dict[str, jax.Array]) -> dict[str, jax.Array]:
        x, g = (
            jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), dict(each))
            for each in (inputs, gradients)
        )
        return add_layer_products(config, x, g, so_far, layer, mesh)

    return nest(jax.lax.fori_loop(0, config.layers, add_layer, flatten(sums)))


def add_layer_products(
    config: ModelConfig,
    inputs: Mapping[str, jax.Array],
    gradients: Mapping[str, jax.Array],
    sums: Mapping[str, jax.Array],
    layer: int | jax.Array,
    mesh: Mesh | None = None,
) -> dict[str, jax.Array]:
    """Flat `sums` {path: [L, *I, *O]} plus the products of one layer's `inputs` {tap: [B, T, F]} and `gradients`.

    `layer` is where it lies in the sums; on a `mesh` as in `add_products`.
    """
    maps = linear_maps(config)

    def own(x: jax.Array, axis: str | None) -> jax.Array:
        if mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, None, axis)))

    out = {}
    for path, stack in sums.items():
        I, O = (None, None) if mesh is None else matrix_spec(config, maps[path], mesh)
        x, g = inputs[str(maps[path].tap)], gradients[path]
        old = jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
        new = absolute_products(own(x, I), own(g.reshape(*g.shape[:2], -1), O), old.reshape(x.shape[-1], -1))
        out[path] = jax.lax.dynamic_update_index_in_dim(stack, new.reshape(old.shape), layer, 0)
    return out


def matrix_spec(config: ModelConfig, weight: Weight, mesh: Mesh) -> PartitionSpec:
    """How a linear map lies on `mesh` when its inputs and its outputs are each flattened to one axis: [I, O]."""
    spec = tuple(partition_spec(config, weight, mesh))[-len(weight.inputs + weight.outputs) :]
    return PartitionSpec(spec[0], spec[len(weight.inputs)])


def no_sums(config: ModelConfig) -> dict[str, Any]:
    """Sums of no samples: float32 zeros for every linear map, a tree like the parameters."""
    return nest(
        {
            path: jnp.zeros((config.layers, *sizes(config, w.inputs + w.outputs)), jnp.float32)
            for path, w in linear_maps(config).items()
        }
    )


def wanda_scores(config: ModelConfig, params: Params, sums: Mapping[str, jax.Array], n: int) -> dict[str, Any]:
    """|W_ij| times the root of the mean over `n` samples of the summed squares of input i; float32 trees.

    Source: arXiv 2306.11695; the same order as |W| ||X_i||_2. Raises ValueError for no samples.
    """
    weight = flatten(params)
    out = {}
    for path, w in linear_maps(config).items():
        inputs = sizes(config, w.inputs)
        ones = (1,) * len(w.outputs)
        norm = jnp.sqrt(sums[str(w.tap)] / at_least_one(n)).reshape(config.layers, *inputs, *ones)
        out[path] = jnp.abs(weight[path].astype(jnp.float32)) * norm
    return nest(out)


def snip_scores(config: ModelConfig, params: Params, sums: Mapping[str, Any], n: int) -> dict[str, Any]:
    """|W_ij| times the mean over `n` samples of |dL_n/dW_ij|; float32 trees. Raises ValueError for no samples."""
    weight, gradient = flatten(params), flatten(sums)
    return nest(
        {
            path: jnp.abs(weight[path].astype(jnp.float32)) * gradient[path] / at_least_one(n)
            for path in linear_maps(config)
        }
    )


def at_least_one(n: int) -> int:
    """`n`, or ValueError where there are no samples to average over."""
    if n < 1:
        raise ValueError(f"a score needs at least one sample; these sums are of {n}")
    return n


def kept_bytes(config: ModelConfig) -> int:
    """Bytes of one tree of SNIP sums."""
    return 4 * sum(math.prod(sizes(config, w.inputs + w.outputs)) for w in linear_maps(config).values()) * config.layers
