"""Low-rank adaptation of linear maps (LoRA, arXiv 2106.09685): W + (alpha / R) A B.

L layers, I and O input and output axes of a linear map, R rank
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import Weight, flatten, linear_maps, nest, partition_spec, sizes

MAPS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Adapters of `rank` for the linear `maps`; their product counts `alpha` / rank."""

    rank: int = 8
    alpha: float = 16.0
    maps: tuple[str, ...] = MAPS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank {self.rank} is not positive")
        unknown = [name for name in self.maps if name not in MAPS]
        if unknown or not self.maps:
            raise ValueError(f"LoRA maps {list(self.maps)} must be some of {', '.join(MAPS)}")


PUBLISHED = LoRA(8, 32.0, ("q", "v"))
"""The adapters of arXiv 2310.03693's code, which also drops 5% of their inputs in training.

Here a change of the weights is trained, which has no inputs of its own, so that nothing is dropped.
"""


def init(config: ModelConfig, lora: LoRA, seed: int, mesh: Mesh | None = None) -> dict[str, Any]:
    """New adapters {"layers": {"q": {"a": [L, *I, R], "b": [L, R, *O]}}}, float32.

    A is normal with variance 1 / I, B is zero, so that the model is the one without adapters. On `mesh` A lies as
    the input axes of its map and B as the output axes.
    """
    table = linear_maps(config)
    keys = jax.random.split(jax.random.key(seed), len(MAPS))
    adapters = {
        name: _adapter(config, table[f"layers/{name}"], lora.rank, keys[MAPS.index(name)], mesh) for name in lora.maps
    }
    return {"layers": adapters}


def _adapter(config: ModelConfig, weight: Weight, rank: int, key: jax.Array, mesh: Mesh | None) -> dict[str, Any]:
    inputs, outputs = sizes(config, weight.inputs), sizes(config, weight.outputs)
    a = jax.random.normal(key, (config.layers, *inputs, rank)) / math.sqrt(math.prod(inputs))
    b = jnp.zeros((config.layers, rank, *outputs))
    if mesh is None:
        return {"a": a, "b": b}
    lead, *axes = partition_spec(config, weight, mesh)
    specs = {"a": (lead, *axes[: len(inputs)], None), "b": (lead, None, *axes[len(inputs) :])}
    placed = {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in specs.items()}
    return jax.device_put({"a": a, "b": b}, placed)


def changes(adapters: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """What `adapters` add to the weights, {"layers": {"q": [L, *I, *O]}}, float32."""

    def change(a: Float[Array, "L ... R"], b: Float[Array, "L R ..."]) -> Float[Array, "L ..."]:
        L, R = a.shape[0], a.shape[-1]
        product = a.reshape(L, -1, R) @ b.reshape(L, R, -1)
        return (alpha / R) * product.reshape(*a.shape[:-1], *b.shape[2:])

    return nest({f"layers/{name}": change(pair["a"], pair["b"]) for name, pair in adapters["layers"].items()})


def changed(params: Params, changes: Mapping[str, Any]) -> dict[str, Any]:
    """`params` plus `changes`, a part of their tree; added in float32, of the dtype of `params`."""
    flat = flatten(params)

    def sum_of(weight: Float[Array, "..."], change: Float[Array, "..."]) -> Float[Array, "..."]:
        return (weight.astype(jnp.float32) + change).astype(weight.dtype)

    return nest(flat | {path: sum_of(flat[path], change) for path, change in flatten(changes).items()})


def merge_adapters(config: ModelConfig, params: Params, adapters: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """The parameters of the model without adapters that computes what `params` with `adapters` do.

    Raises ValueError for adapters of another model.
    """
    table = linear_maps(config)
    for name, pair in adapters["layers"].items():
        weight = table[f"layers/{name}"]
        expected = (config.layers, *sizes(config, weight.inputs)), (config.layers, *sizes(config, weight.outputs))
        found = pair["a"].shape[:-1], (pair["b"].shape[0], *pair["b"].shape[2:])
        if found != expected:
            raise ValueError(f"adapter of {name!r} has axes {found}; the map of this model has {expected}")
    return changed(params, changes(adapters, alpha))
