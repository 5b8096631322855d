"""The decoder of all families: pure, scanned over layers, the key/value cache in the carry of the scan.

What sets layers of a model apart is scanned with them (see `Kind`), so that there is one compiled layer.

Axes: B batch, T query position, S key position, D embed, N heads, K kv_heads, H head_dim, R turned features / 2,
V vocab, L layers, n rotary tables
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafe.model.attention import Queries, Slots, rotate, rotation
from jaxsafe.model.blockwise import Scaling
from jaxsafe.model.config import ModelConfig, Rope
from jaxsafe.model.joined import JoinedQueries, JoinedSlots
from jaxsafe.model.products import PRODUCT, product, wide_product
from jaxsafe.model.taps import EMBED, FINAL, collection, tap
from jaxsafe.model.weights import layer_shape, weights

Params = Mapping[str, Any]
"""The tree of weights, by the paths of the weight table."""
Edits = Mapping[str, Any] | None
"""What changes the activations, by tap: an `Edit` or another pytree that is called in the same way."""


@flax.struct.dataclass
class Cache:
    """Keys and values of every layer; the slots of a row are filled in order."""

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]

    @property
    def length(self) -> int:
        """S, the number of slots."""
        return self.k.shape[3]


def rms_norm(
    x: Float[Array, "*B F"], scale: Float[Array, "..."], eps: float, form: str = "rounded"
) -> Float[Array, "*B F"]:
    """x / rms(x) * scale over the last axis, the division in float32; `form` as `ModelConfig.norm`."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
    if form == "rounded":
        return scale.astype(x.dtype) * y.astype(x.dtype)
    weight = scale.astype(jnp.float32)
    return (y * (1 + weight if form == "plus_one" else weight)).astype(x.dtype)


KEEPS: Mapping[str, Any] = {
    "everything": None,
    "products": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "nothing": jax.checkpoint_policies.nothing_saveable,
}
"""What a backward pass keeps of a layer, and does not compute again: "products" are the outputs of its linear maps."""


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Kind(NamedTuple):
    """What sets a layer apart from the others of its model.

    window: how many of the latest positions its queries see; None where all layers see all.
    table: which of the model's rotary tables is its own; None where there is one for all.
    """

    window: Int[Array, "*L"] | None
    table: Int[Array, "*L"] | None


class Turns(NamedTuple):
    """Cosines and sines of the rotary embeddings, with a leading axis of tables where layers differ."""

    cos: Float[Array, "*n B T 1 R"]
    sin: Float[Array, "*n B T 1 R"]


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "B T D"], Cache | None, Int[Array, ""]],
        kind: Kind,
        queries: Queries | JoinedQueries,
        turns: Turns,
    ) -> tuple[tuple[Float[Array, "B T D"], Cache | None, Int[Array, ""]], Cache | None]:
        """The carry (residual stream, cache, number of the layer) after the layer, and its keys and values.

        Keys and values are returned, without a leading L, where there is no cache to hold them.
        """
        c = self.config
        x, cache, layer = carry
        table = weights(c)

        def weight(name: str) -> Array:
            row = table[f"layers/{name}"]
            return self.param(name, initializer(row.kind, c.norm), layer_shape(c, row), c.dtype)

        def linear(h: Array, name: str) -> Array:
            w = weight(name)
            features = w.shape[1:] if name in "qkv" else w.shape[-1:]
            y = product(h, w.reshape(h.shape[-1], -1), c.wide)
            # A pytree beside the weight, while adapters are trained.
            adapter: Callable[[Array], Array] | None = self.get_variable("params", f"{name}_adapter")
            if adapter is not None:
                y = (y.astype(jnp.float32) + adapter(h)).astype(y.dtype)
            if f"layers/{name}_bias" in table:
                y = y + weight(f"{name}_bias").reshape(1, 1, -1).astype(y.dtype)
            # The gradient at a zero perturbation of collection "perturbations" is that of the map's output.
            return self.perturb(f"{name}_out", y.reshape(*h.shape[:-1], *features))

        def passed(name: str, value: Array) -> Array:
            return tap(name)(value, queries.positions)

        def heads(h: Array, name: str) -> Array:
            y = linear(h, name)
            return passed(name, y.reshape(*h.shape[:-1], -1)).reshape(y.shape)

        def normed(h: Array, name: str) -> Array:
            return rms_norm(h, weight(name), c.norm_eps, c.norm) if f"layers/{name}" in table else h

        def heads_normed(h: Array, name: str) -> Array:
            return normed(h.reshape(*h.shape[:2], -1), name).reshape(h.shape) if c.projection_norm else normed(h, name)

        with jax.named_scope("attention"):
            h = passed("attn_in", normed(x, "attn_norm").astype(c.dtype))
            q, k, v = (heads(h, name) for name in "qkv")
            q, k = heads_normed(q, "q_norm"), heads_normed(k, "k_norm")
            cos, sin = turns if kind.table is None else jax.tree.map(lambda table: table[kind.table], turns)
            q, k, v = (a.astype(c.dtype) for a in (rotate(q, cos, sin), rotate(k, cos, sin), v))
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            new: Cache | None = Cache(k, v)
            if cache is not None:
                assert isinstance(queries, Queries), "a joined row has no cache"
                cache = jax.tree.map(
                    lambda old, u: jax.lax.dynamic_update_slice(
                        old, u[None].astype(old.dtype), (layer, 0, 0, queries.slots[0], 0)
                    ),
                    cache,
                    new,
                )
                k, v = (
                    jax.lax.dynamic_index_in_dim(old, layer, 0, keepdims=False).astype(q.dtype)
                    for old in (cache.k, cache.v)
                )
                new = None
            scaling = Scaling((c.query_scalar or c.head_dim) ** -0.5, c.softcap)
            h = passed("heads", queries.attend(q, k, v, kind.window, scaling))
            h = passed("o", linear(h, "o"))
            x = x + passed("attn_out", normed(h, "attn_post_norm"))
        with jax.named_scope("mlp"):
            h = passed("mlp_in", normed(x, "mlp_norm").astype(c.dtype))
            # In float32 and rounded once: on CPUs each operation in half precision is two conversions more.
            gate, up = (linear(h, name).astype(jnp.float32) for name in ("gate", "up"))
            h = passed("mlp_hidden", (ACTIVATIONS[c.activation](gate) * up).astype(h.dtype))
            h = passed("down", linear(h, "down"))
            x = passed("resid", x + passed("mlp_out", normed(h, "mlp_post_norm")))
        return (x, cache, layer + 1), new


def layer_kinds(config: ModelConfig, slots: int) -> Kind:
    """The kinds of all layers, where queries see `slots` slots in all."""
    windows = [slots if window is None else window for window in config.windows]
    tables = rotary_tables(config)
    return Kind(
        window=jnp.asarray(windows, jnp.int32) if min(windows) < slots else None,
        table=jnp.asarray([tables.index(r) for r in config.layer_ropes], jnp.int32) if len(tables) > 1 else None,
    )


def rotary_tables(config: ModelConfig) -> list[Rope]:
    """The different rotary embeddings of a model's layers."""
    return list(dict.fromkeys(config.layer_ropes))


def all_turns(config: ModelConfig, positions: Int[Array, "B T"]) -> Turns:
    """The rotary tables of all layers."""
    tables = [Turns(*rotation(rope, config.head_dim, positions)) for rope in rotary_tables(config)]
    return tables[0] if len(tables) == 1 else jax.tree.map(lambda *each: jnp.stack(each), *tables)


def initializer(kind: str, norm: str = "rounded") -> nn.initializers.Initializer:
    """Normal(0.02) for maps and the embedding, the identity for norms, zero for biases."""
    one = nn.initializers.zeros if norm == "plus_one" else nn.initializers.ones
    return {"map": nn.initializers.normal(0.02), "norm": one, "bias": nn.initializers.zeros}[kind]


def embedded(config: ModelConfig, embedding: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """What enters the first block."""
    x = embedding[tokens].astype(config.stream_dtype)
    return x * jnp.asarray(config.embed**0.5, x.dtype) if config.embed_scaled else x


class Transformer(nn.Module):
    """Tokens to logits. Collections: `params`; `edits` and `reducers` by tap (see `taps.py`).

    `keeps`: what a backward pass keeps of a layer besides its input (see `KEEPS`).
    """

    config: ModelConfig
    keeps: str = "everything"

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        slots: Slots | JoinedSlots,
        cache: Cache | None = None,
        last: int | None = None,
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Logits, float32 (of the `last` positions only, where given), and the keys and values.

        Without `cache` the queries see the T keys of this call, which are returned; with it,
        keys and values are written from slot `slots.first` on, the S slots of the cache are seen, and the whole
        cache is returned.
        """
        c = self.config
        embedding = self.param("embed", initializer("map"), (c.vocab, c.embed), c.dtype)
        queries = slots.queries(tokens.shape[1])
        with jax.named_scope("embed"):
            x = tap(EMBED)(embedded(c, embedding, tokens), queries.positions)
            turns = all_turns(c, queries.positions)
        policy = KEEPS[self.keeps]
        blocks = nn.scan(
            Block if policy is None else nn.remat(Block, prevent_cse=False, policy=policy),
            variable_axes={"params": 0, "intermediates": 0, "edits": 0, "perturbations": 0},
            variable_broadcast="reducers",
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.layers,
        )
        carry = (x, cache, jnp.int32(0))
        kinds = layer_kinds(c, slots.valid.shape[1])
        new: Any
        (x, cache, _), new = blocks(c, name="layers")(carry, kinds, queries, turns)
        with jax.named_scope("unembed"):
            x = rms_norm(x, self.param("norm", initializer("norm", c.norm), (c.embed,), c.dtype), c.norm_eps, c.norm)
            x = tap(FINAL)(x.astype(c.dtype), queries.positions)
            x = x if last is None else x[:, x.shape[1] - last :]
            head = embedding if c.tied else self.param("unembed", initializer("map"), (c.embed, c.vocab), c.dtype)
            logits = unembed(c, x, head)
        return logits, cache if cache is not None else new


def unembed(
    config: ModelConfig, x: Float[Array, "*B D"], head: Float[Array, "V D"] | Float[Array, "D V"]
) -> Float[Array, "*B V"]:
    """Logits, float32, of normed `x`; `head` is [V, D] where tied, else [D, V]."""
    logits = wide_product(x, head, config.tied)
    return logits if (c := config.final_softcap) is None else c * jnp.tanh(logits / c)


def unembedding(config: ModelConfig, params: Params) -> Float[Array, "V D"] | Float[Array, "D V"]:
    """The matrix that `unembed` takes."""
    return params["embed"] if config.tied else params["unembed"]


def variables(params: Params, edits: Edits = None) -> dict[str, Any]:
    """The collections of an `apply`: parameters and the edits."""
    tree = collection(edits, "edit")
    return {"params": params, **({"edits": tree} if tree else {})}


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    edits: Edits = None,
    last: int | None = None,
) -> Float[Array, "B T V"]:
    """Logits, float32, of left-padded `tokens`, of which `valid` are no padding.

    Pure, jittable (`config` and `last` static) and differentiable. `edits` maps a tap to an `Edit`; `last`
    keeps only the final positions.
    """
    logits, _ = Transformer(config).apply(variables(params, edits), tokens, Slots(valid), last=last)
    return logits


def init(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Random parameters of a model of this `config`."""
    one, slots = jnp.zeros((1, 1), jnp.int32), Slots(jnp.ones((1, 1), bool))
    return dict(Transformer(config).init(jax.random.key(seed), one, slots, mutable=["params"])["params"])
