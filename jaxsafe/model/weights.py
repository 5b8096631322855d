"""The weight table: one line a weight, from which shapes, initialisers, shardings and file names all follow."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsafe.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight: its `path` in the parameter tree, its Hugging Face name, its named axes and what it is.

    `axes` of a linear map read "in -> out"; Hugging Face stores such a map as the matrix [out, in], and norms and
    biases flat. A name with `{}` stands for one array a layer, stacked in the tree on a leading axis L.
    `kind`: a "map" (the embedding too), a "norm" or a "bias"; `tap`: what feeds a map;
    `needs`: the flag of `ModelConfig` without which a model does not have the weight.
    """

    path: str
    hf: str
    axes: str
    kind: Literal["map", "norm", "bias"] = "map"
    tap: str | None = None
    needs: str | None = None

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf

    @property
    def linear(self) -> bool:
        return "->" in self.axes

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.axes.partition(" -> ")[0].split()) if self.linear else ()

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self.axes.partition(" -> ")[2].split()) if self.linear else tuple(self.axes.split())


LAYER = "model.layers.{}."
# A path has several rows where families call it differently; a model has one of them at most.
TABLE = (
    Weight("embed", "model.embed_tokens.weight", "vocab embed"),
    Weight("layers/attn_norm", "model.layers.{}.input_layernorm.weight", "embed", "norm", needs="pre_norm"),
    Weight("layers/q", "model.layers.{}.self_attn.q_proj.weight", "embed -> heads head_dim", tap="attn_in"),
    Weight("layers/k", "model.layers.{}.self_attn.k_proj.weight", "embed -> kv_heads head_dim", tap="attn_in"),
    Weight("layers/v", "model.layers.{}.self_attn.v_proj.weight", "embed -> kv_heads head_dim", tap="attn_in"),
    Weight("layers/o", "model.layers.{}.self_attn.o_proj.weight", "heads head_dim -> embed", tap="heads"),
    Weight("layers/q_bias", "model.layers.{}.self_attn.q_proj.bias", "heads head_dim", "bias", needs="qkv_bias"),
    Weight("layers/k_bias", "model.layers.{}.self_attn.k_proj.bias", "kv_heads head_dim", "bias", needs="qkv_bias"),
    Weight("layers/v_bias", "model.layers.{}.self_attn.v_proj.bias", "kv_heads head_dim", "bias", needs="qkv_bias"),
    Weight("layers/o_bias", "model.layers.{}.self_attn.o_proj.bias", "embed", "bias", needs="o_bias"),
    Weight("layers/q_norm", f"{LAYER}self_attn.q_norm.weight", "head_dim", "norm", needs="head_norm"),
    Weight("layers/k_norm", f"{LAYER}self_attn.k_norm.weight", "head_dim", "norm", needs="head_norm"),
    Weight("layers/q_norm", f"{LAYER}self_attn.q_norm.weight", "heads head_dim", "norm", needs="projection_norm"),
    Weight("layers/k_norm", f"{LAYER}self_attn.k_norm.weight", "kv_heads head_dim", "norm", needs="projection_norm"),
    Weight("layers/attn_post_norm", f"{LAYER}post_attention_layernorm.weight", "embed", "norm", needs="post_norm"),
    Weight("layers/mlp_norm", f"{LAYER}post_attention_layernorm.weight", "embed", "norm", needs="lone_pre_norm"),
    Weight("layers/mlp_norm", f"{LAYER}pre_feedforward_layernorm.weight", "embed", "norm", needs="sandwich"),
    Weight("layers/mlp_post_norm", f"{LAYER}post_feedforward_layernorm.weight", "embed", "norm", needs="post_norm"),
    Weight("layers/gate", "model.layers.{}.mlp.gate_proj.weight", "embed -> mlp", tap="mlp_in"),
    Weight("layers/up", "model.layers.{}.mlp.up_proj.weight", "embed -> mlp", tap="mlp_in"),
    Weight("layers/down", "model.layers.{}.mlp.down_proj.weight", "mlp -> embed", tap="mlp_hidden"),
    Weight("layers/gate_bias", "model.layers.{}.mlp.gate_proj.bias", "mlp", "bias", needs="mlp_bias"),
    Weight("layers/up_bias", "model.layers.{}.mlp.up_proj.bias", "mlp", "bias", needs="mlp_bias"),
    Weight("layers/down_bias", "model.layers.{}.mlp.down_proj.bias", "embed", "bias", needs="mlp_bias"),
    Weight("norm", "model.norm.weight", "embed", "norm"),
    Weight("unembed", "lm_head.weight", "embed -> vocab", tap="final", needs="untied"),
)

# Named axis -> mesh axis. Inputs of a map and the embedding width are split over `data` (as in fully sharded
# data parallelism), everything wide over `model`.
RULES = {"vocab": "model", "heads": "model", "kv_heads": "model", "mlp": "model", "embed": "data"}


def weights(config: ModelConfig) -> dict[str, Weight]:
    """The rows of the table that a model of this `config` has, by path."""
    return {w.path: w for w in TABLE if w.needs is None or getattr(config, w.needs)}


def linear_maps(config: ModelConfig) -> dict[str, Weight]:
    """The linear maps inside the blocks (q, k, v, o, gate, up, down), by path."""
    return {path: w for path, w in weights(config).items() if w.linear and w.stacked}


def sizes(config: ModelConfig, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The lengths of named axes."""
    return tuple(getattr(config, axis) for axis in axes)


def layer_shape(config: ModelConfig, weight: Weight) -> tuple[int, ...]:
    """The shape of one layer's array of `weight` (of the whole array, where it is not stacked)."""
    return sizes(config, weight.inputs + weight.outputs)


def shapes(config: ModelConfig) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    lead = {True: (config.layers,), False: ()}
    return nest(
        {
            path: jax.ShapeDtypeStruct(lead[w.stacked] + layer_shape(config, w), config.dtype)
            for path, w in weights(config).items()
        }
    )


def partition_spec(config: ModelConfig, weight: Weight, mesh: Mesh) -> PartitionSpec:
    """How `weight` lies on `mesh`: each named axis by RULES, replicated where the mesh axis does not divide it."""
    entries: list[str | None] = [None] if weight.stacked else []
    for axis in weight.inputs + weight.outputs:
        target = RULES.get(axis)
        fits = target in mesh.shape and getattr(config, axis) % mesh.shape[target] == 0
        entries.append(target if fits and target not in entries else None)
    return PartitionSpec(*entries)


def shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """The parameter tree as `NamedSharding`s on `mesh`."""
    return nest({path: NamedSharding(mesh, partition_spec(config, w, mesh)) for path, w in weights(config).items()})


def to_matrix(config: ModelConfig, weight: Weight, array: Any) -> Any:
    """One layer's array in Hugging Face's layout: [out, in] for a linear map, flat for norms and biases."""
    if not weight.linear:
        return array if weight.kind == "map" else array.reshape(-1)
    n_in = len(weight.inputs)
    out = array.transpose(*range(n_in, array.ndim), *range(n_in))
    i, o = math.prod(sizes(config, weight.inputs)), math.prod(sizes(config, weight.outputs))
    return out.reshape(o, i)


def from_matrix(config: ModelConfig, weight: Weight, array: Any) -> Any:
    """The inverse of `to_matrix`."""
    if not weight.linear:
        return array.reshape(layer_shape(config, weight))
    n_out = len(weight.outputs)
    out = array.reshape(sizes(config, weight.outputs + weight.inputs))
    return out.transpose(*range(n_out, out.ndim), *range(n_out))


def hf_tensors(config: ModelConfig, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(Hugging Face name, array in its layout) of every leaf of `tree`, one layer at a time.

    `tree` has the structure of the parameters or a part of it: parameters, scores and masks alike.
    """
    table = weights(config)
    for path, leaf in flatten(tree).items():
        if path not in table:
            raise ValueError(f"{path!r} is not a weight of this model; it has {sorted(table)}")
        weight = table[path]
        if weight.stacked:
            for layer in range(leaf.shape[0]):
                yield weight.hf.format(layer), to_matrix(config, weight, leaf[layer])
        else:
            yield weight.hf, to_matrix(config, weight, leaf)


def hf_view(config: ModelConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` (parameters, scores or masks) by Hugging Face name, in the layout of its files: maps are [out, in]."""
    return dict(hf_tensors(config, tree))


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a Hugging Face checkpoint of this model holds."""
    out = {}
    for w in weights(config).values():
        shape = layer_shape(config, w)
        if w.linear:
            shape = (math.prod(sizes(config, w.outputs)), math.prod(sizes(config, w.inputs)))
        elif w.kind != "map":
            shape = (math.prod(shape),)
        for layer in range(config.layers) if w.stacked else [0]:
            out[w.hf.format(layer)] = shape
    return out


def count_parameters(tree: Any) -> int:
    """The number of scalars in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"layers/q": x} -> {"layers": {"q": x}}."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"layers": {"q": x}} -> {"layers/q": x}."""
    return traverse_util.flatten_dict(tree, sep="/")
