"""Low-rank adaptation of linear maps (LoRA, arXiv 2106.09685): x W + (alpha / R) (dropped x) A B.

B batch, T slots, L layers, I and O input and output axes of a linear map, R rank
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt

from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import flatten, linear_maps, nest, partition_spec, sizes

MAPS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Adapters of `rank` for the linear `maps`; their product counts `alpha` / rank.

    dropout: the share of an adapter's inputs that a training step drops.
    """

    rank: int = 8
    alpha: float = 16.0
    maps: tuple[str, ...] = MAPS
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout {self.dropout} is outside [0, 1)")
        if self.rank < 1:
            raise ValueError(f"LoRA rank {self.rank} is not positive")
        unknown = [name for name in self.maps if name not in MAPS]
        if unknown or not self.maps:
            raise ValueError(f"LoRA maps {list(self.maps)} must be some of {', '.join(MAPS)}")

    @property
    def scale(self) -> float:
        """What the product of the adapters counts."""
        return self.alpha / self.rank


PUBLISHED = LoRA(8, 32.0, ("q", "v"), 0.05)
"""The adapters of arXiv 2310.03693's code."""


@flax.struct.dataclass
class LowRank:
    """What the adapters of a map add to its outputs: `scale` (dropped x) A B. A layer sees its own, without L.

    keys: of each row's dropped inputs, see `row_keys`; None where nothing is dropped.
    """

    a: Float[Array, "*L I R"]
    b: Float[Array, "*L R O"]
    scale: Float[Array, "*L"]
    keys: UInt[Array, "*L B 2"] | None = None
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """What is added, float32."""
        return self.scale * (dropped(x, self.keys, self.dropout) @ self.a @ self.b)


@flax.struct.dataclass
class Change:
    """A change of a map's weights whose inputs are dropped: (dropped x) `weight`. Fields as of `LowRank`."""

    weight: Float[Array, "*L I O"]
    keys: UInt[Array, "*L B 2"]
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """What is added, float32."""
        return dropped(x, self.keys, self.dropout) @ self.weight


def dropped(x: Float[Array, "B T I"], keys: UInt[Array, "B 2"] | None, share: float) -> Float[Array, "B T I"]:
    """`x` in float32, of which each entry is 0 with probability `share`, and the others grow by 1 / (1 - share).

    A row's draws follow from its key and count slots from the last one, so that padding in front changes none.
    """
    x = x.astype(jnp.float32)
    if keys is None:
        return x

    def kept(key: UInt[Array, "2"]) -> Array:
        return jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - share, x.shape[1:])[::-1]

    return jnp.where(jax.vmap(kept)(keys), x / (1 - share), 0)


def row_keys(rows: UInt[Array, "B 2"], name: str, layers: int) -> UInt[Array, "L B 2"]:
    """The keys by which the map `name` drops inputs, from those of the rows at this step."""

    def folded(key: UInt[Array, "2"], layer: Array) -> UInt[Array, "2"]:
        place = MAPS.index(name) + len(MAPS) * layer
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), place))

    return jax.vmap(jax.vmap(folded, (0, None)), (None, 0))(rows, jnp.arange(layers))


def beside(params: Params, parts: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with what `parts` say beside each map: {"q": a `LowRank`, a `Change`}; the model adds it."""
    return {**params, "layers": {**params["layers"], **{f"{name}_adapter": part for name, part in parts.items()}}}


def unmerged(
    params: Params, adapters: Mapping[str, Any], scale: float | Array, keys: UInt[Array, "B 2"] | None, dropout: float
) -> dict[str, Any]:
    """`params` with `adapters` beside them: no gradient of a whole weight, and inputs may be dropped.

    scale: what the product of the adapters counts; keys: of the rows of the batch, None to drop nothing.
    """

    def part(name: str, a: Float[Array, "L ... R"], b: Float[Array, "L R ..."]) -> LowRank:
        L, R = a.shape[0], a.shape[-1]
        own = None if keys is None else row_keys(keys, name, L)
        every = jnp.full(L, scale, jnp.float32)
        return LowRank(a.reshape(L, -1, R), b.reshape(L, R, -1), every, own, dropout)

    return beside(params, {name: part(name, **pair) for name, pair in adapters["layers"].items()})


def beside_changes(
    config: ModelConfig, params: Params, changes: Mapping[str, Any], keys: UInt[Array, "B 2"], dropout: float
) -> dict[str, Any]:
    """`params` with whole `changes` of weights, as of `changes`, beside them, whose inputs are dropped."""

    table, L = linear_maps(config), config.layers

    def part(name: str, change: Float[Array, "L ..."]) -> Change:
        I = math.prod(sizes(config, table[f"layers/{name}"].inputs))
        return Change(change.reshape(L, I, -1), row_keys(keys, name, L), dropout)

    return beside(params, {name: part(name, change) for name, change in changes["layers"].items()})


def init(config: ModelConfig, lora: LoRA, seed: int, mesh: Mesh | None = None) -> dict[str, Any]:
    """New adapters {"layers": {"q": {"a": [L, *I, R], "b": [L, R, *O]}}}, float32.

    A is normal with variance 1 / I, B is zero, so that the model is the one without adapters. On `mesh` they lie as
    `shardings` says.
    """
    keys = jax.random.split(jax.random.key(seed), len(MAPS))

    def pair(name: str) -> dict[str, Any]:
        weight = linear_maps(config)[f"layers/{name}"]
        inputs, outputs = sizes(config, weight.inputs), sizes(config, weight.outputs)
        a = jax.random.normal(keys[MAPS.index(name)], (config.layers, *inputs, lora.rank))
        return {"a": a / math.sqrt(math.prod(inputs)), "b": jnp.zeros((config.layers, lora.rank, *outputs))}

    adapters = {"layers": {name: pair(name) for name in lora.maps}}
    return adapters if mesh is None else jax.device_put(adapters, shardings(config, lora, mesh))


def shardings(config: ModelConfig, lora: LoRA, mesh: Mesh) -> dict[str, Any]:
    """How adapters lie on `mesh`: A as the input axes of its map, B as the output axes."""

    def pair(name: str) -> dict[str, NamedSharding]:
        weight = linear_maps(config)[f"layers/{name}"]
        lead, *axes = partition_spec(config, weight, mesh)
        inputs, outputs = axes[: len(weight.inputs)], axes[len(weight.inputs) :]
        specs = {"a": (lead, *inputs, None), "b": (lead, None, *outputs)}
        return {part: NamedSharding(mesh, PartitionSpec(*spec)) for part, spec in specs.items()}

    return {"layers": {name: pair(name) for name in lora.maps}}


def changes(adapters: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """What `adapters` add to the weights, {"layers": {"q": [L, *I, *O]}}, float32."""
    return scaled(adapters, alpha / next(iter(adapters["layers"].values()))["a"].shape[-1])


def scaled(adapters: Mapping[str, Any], scale: float | Array) -> dict[str, Any]:
    """`scale` times the products of `adapters`, {"layers": {"q": [L, *I, *O]}}, float32."""

    def change(a: Float[Array, "L ... R"], b: Float[Array, "L R ..."]) -> Float[Array, "L ..."]:
        L, R = a.shape[0], a.shape[-1]
        product = a.reshape(L, -1, R) @ b.reshape(L, R, -1)
        return scale * product.reshape(*a.shape[:-1], *b.shape[2:])

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
