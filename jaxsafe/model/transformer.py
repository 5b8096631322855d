"""The Llama and Mistral decoder: pure, scanned over layers, the key/value cache in the carry of the scan.

Axes: B batch, T query position, S key position, D embed, N heads, K kv_heads, H head_dim, R = H / 2, V vocab, L layers
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafe.model.attention import Queries, Slots, attend, rotate, rotation
from jaxsafe.model.config import ModelConfig
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


def rms_norm(x: Float[Array, "*B F"], scale: Float[Array, " F"], eps: float) -> Float[Array, "*B F"]:
    """x / rms(x) * scale over the last axis, the division in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return scale.reshape((1,) * (x.ndim - 1) + (-1,)) * y.astype(x.dtype)


KEEPS: Mapping[str, Any] = {
    "everything": None,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
}
"""What a backward pass keeps of a layer, and does not compute again: "products" are the outputs of its linear maps."""


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "B T D"], Cache | None, Int[Array, ""]],
        window: int | Int[Array, ""] | None,
        queries: Queries,
        cos: Float[Array, "B T 1 R"],
        sin: Float[Array, "B T 1 R"],
    ) -> tuple[tuple[Float[Array, "B T D"], Cache | None, Int[Array, ""]], Cache | None]:
        """The carry (residual stream, cache, number of the layer) after the layer, and its keys and values.

        `window`: how many of the latest positions this layer's queries see; None for all. Keys and values are
        returned, without a leading L, where there is no cache to hold them.
        """
        c = self.config
        x, cache, layer = carry
        table = weights(c)

        def weight(name: str) -> Array:
            row = table[f"layers/{name}"]
            return self.param(name, initializer(row.kind), layer_shape(c, row), c.dtype)

        def linear(h: Array, name: str) -> Array:
            w = weight(name)
            features = w.shape[1:] if name in "qkv" else w.shape[-1:]
            y = h @ w.reshape(h.shape[-1], -1)
            if f"layers/{name}_bias" in table:
                y = y + weight(f"{name}_bias").reshape(1, 1, -1)
            # The gradient at a zero perturbation of collection "perturbations" is that of the map's output.
            return self.perturb(f"{name}_out", y.reshape(*h.shape[:-1], *features))

        def passed(name: str, value: Array) -> Array:
            return tap(name)(value, queries.positions)

        def heads(h: Array, name: str) -> Array:
            y = linear(h, name)
            return passed(name, y.reshape(*h.shape[:-1], -1)).reshape(y.shape)

        with jax.named_scope("attention"):
            h = passed("attn_in", rms_norm(x, weight("attn_norm"), c.norm_eps))
            q, k, v = (heads(h, name) for name in "qkv")
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            new: Cache | None = Cache(k, v)
            if cache is not None:
                cache = jax.tree.map(
                    lambda old, u: jax.lax.dynamic_update_slice(old, u[None], (layer, 0, 0, queries.slots[0], 0)),
                    cache,
                    new,
                )
                k, v = (jax.lax.dynamic_index_in_dim(old, layer, 0, keepdims=False) for old in (cache.k, cache.v))
                new = None
            h = passed("heads", attend(q, k, v, queries, window))
            x = x + passed("attn_out", linear(h, "o"))
        with jax.named_scope("mlp"):
            h = passed("mlp_in", rms_norm(x, weight("mlp_norm"), c.norm_eps))
            h = passed("mlp_hidden", jax.nn.silu(linear(h, "gate")) * linear(h, "up"))
            x = passed("resid", x + passed("mlp_out", linear(h, "down")))
        return (x, cache, layer + 1), new


def layer_windows(config: ModelConfig, slots: int) -> Int[Array, " L"] | None:
    """How many positions the queries of each layer see; None where they see all `slots` in every layer."""
    if config.window is None or config.window >= slots:
        return None
    return jnp.full(config.layers, config.window, jnp.int32)


def initializer(kind: str) -> nn.initializers.Initializer:
    """Normal(0.02) for maps and the embedding, one for norms, zero for biases."""
    return {"map": nn.initializers.normal(0.02), "norm": nn.initializers.ones, "bias": nn.initializers.zeros}[kind]


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
        slots: Slots,
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
            x = tap(EMBED)(embedding[tokens], queries.positions)
            cos, sin = rotation(c.rope, c.head_dim, queries.positions)
        policy = KEEPS[self.keeps]
        blocks = nn.scan(
            Block if policy is None else nn.remat(Block, prevent_cse=False, policy=policy),
            variable_axes={"params": 0, "intermediates": 0, "edits": 0, "perturbations": 0},
            variable_broadcast="reducers",
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.layers,
        )
        carry = (x, cache, jnp.int32(0))
        windows = layer_windows(c, slots.valid.shape[1])
        new: Any
        (x, cache, _), new = blocks(c, name="layers")(carry, windows, queries, cos, sin)
        with jax.named_scope("unembed"):
            x = rms_norm(x, self.param("norm", initializer("norm"), (c.embed,), c.dtype), c.norm_eps)
            x = tap(FINAL)(x, queries.positions)
            x = x if last is None else x[:, x.shape[1] - last :]
            head = embedding if c.tied else self.param("unembed", initializer("map"), (c.embed, c.vocab), c.dtype)
            logits = unembed(x, head, c.tied)
        return logits, cache if cache is not None else new


def unembed(
    x: Float[Array, "*B D"], head: Float[Array, "V D"] | Float[Array, "D V"], tied: bool
) -> Float[Array, "*B V"]:
    """Logits, float32, of normed `x`; `head` is [V, D] where tied, else [D, V]."""
    return jnp.einsum("...d,vd->...v" if tied else "...d,dv->...v", x, head, preferred_element_type=jnp.float32)


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
