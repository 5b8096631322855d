"""The Llama and Mistral decoder: pure, scanned over layers, the key/value cache in the carry of the scan.

B batch, T query position, S key position, D embed, N heads, K kv_heads, H head_dim, F mlp, V vocab, L layers
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxsafe.model.attention import attend, causal_mask, positions_of, rotate, rotation
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import FINAL, Tap, collection
from jaxsafe.model.weights import layer_shape, weights

Params = Mapping[str, Any]


@flax.struct.dataclass
class Cache:
    """Keys and values of every layer, [L, B, K, S, H]; the slots of a row are filled in order."""

    k: jax.Array
    v: jax.Array

    @property
    def length(self) -> int:
        """S, the number of slots."""
        return self.k.shape[3]


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, the division in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return scale * y.astype(x.dtype)


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
        carry: tuple,
        _: None,
        cos: jax.Array,
        sin: jax.Array,
        mask: jax.Array,
        positions: jax.Array,
        slot: Any,
    ) -> tuple:
        c = self.config
        x, cache, layer = carry
        table = weights(c)

        def weight(name: str) -> jax.Array:
            row = table[f"layers/{name}"]
            return self.param(name, initializer(row.linear, bool(row.needs)), layer_shape(c, row), c.dtype)

        def linear(h: jax.Array, name: str) -> jax.Array:
            w = weight(name)
            features = w.shape[1:] if name in "qkv" else w.shape[-1:]
            y = h @ w.reshape(h.shape[-1], -1)
            if f"layers/{name}_bias" in table:
                y = y + weight(f"{name}_bias").reshape(-1)
            # The gradient at a zero perturbation of collection "perturbations" is that of the map's output.
            return self.perturb(f"{name}_out", y.reshape(*h.shape[:-1], *features))

        def tap(name: str, value: jax.Array) -> jax.Array:
            return Tap(name=name)(value, positions)

        with jax.named_scope("attention"):
            h = tap("attn_in", rms_norm(x, weight("attn_norm"), c.norm_eps))
            q, k, v = (linear(h, name) for name in "qkv")
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            new: Cache | None = Cache(k, v)
            if cache is not None:
                cache = jax.tree.map(
                    lambda old, u: jax.lax.dynamic_update_slice(old, u[None], (layer, 0, 0, slot, 0)),
                    cache,
                    new,
                )
                k, v = (jax.lax.dynamic_index_in_dim(old, layer, 0, keepdims=False) for old in (cache.k, cache.v))
                new = None
            h = tap("heads", attend(q, k, v, mask))
            x = x + tap("attn_out", linear(h, "o"))
        with jax.named_scope("mlp"):
            h = tap("mlp_in", rms_norm(x, weight("mlp_norm"), c.norm_eps))
            h = tap("mlp_hidden", jax.nn.silu(linear(h, "gate")) * linear(h, "up"))
            x = tap("resid", x + tap("mlp_out", linear(h, "down")))
        return (x, cache, layer + 1), new


def initializer(linear: bool, bias: bool = False) -> nn.initializers.Initializer:
    """Normal(0.02) for maps and embeddings, one for norms, zero for biases."""
    if bias:
        return nn.initializers.zeros
    return nn.initializers.normal(0.02) if linear else nn.initializers.ones


class Transformer(nn.Module):
    """Tokens to logits. Collections: `params`; `edits` and `reducers` by tap (see `taps.py`).

    `keeps`: what a backward pass keeps of a layer besides its input (see `KEEPS`).
    """

    config: ModelConfig
    keeps: str = "everything"

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: Cache | None = None,
        slot: jax.Array | int = 0,
        last: int | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Logits float32 [B, T, V] (of the `last` positions only, where given) and the keys and values.

        `tokens`, `positions` int32 [B, T]; `mask` bool [B, T, S]. Without `cache` the queries see the T
        keys of this call, which are returned; with it, keys and values are written from `slot` on, the S
        slots of the cache are seen, and the whole cache is returned.
        """
        c = self.config
        embedding = self.param("embed", initializer(True), (c.vocab, c.embed), c.dtype)
        with jax.named_scope("embed"):
            x = embedding[tokens]
            cos, sin = rotation(c.rope, c.head_dim, positions)
        policy = KEEPS[self.keeps]
        blocks = nn.scan(
            Block if policy is None else nn.remat(Block, prevent_cse=False, policy=policy),
            variable_axes={"params": 0, "intermediates": 0, "edits": 0, "perturbations": 0},
            variable_broadcast="reducers",
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.layers,
        )
        carry = (x, cache, jnp.int32(0))
        (x, cache, _), new = blocks(c, name="layers")(carry, None, cos, sin, mask, positions, slot)
        with jax.named_scope("unembed"):
            x = rms_norm(x, self.param("norm", initializer(False), (c.embed,), c.dtype), c.norm_eps)
            x = Tap(name=FINAL)(x, positions)
            x = x if last is None else x[:, x.shape[1] - last :]
            head = embedding if c.tied else self.param("unembed", initializer(True), (c.embed, c.vocab), c.dtype)
            logits = unembed(x, head, c.tied)
        return logits, cache if cache is not None else new


def unembed(x: jax.Array, head: jax.Array, tied: bool) -> jax.Array:
    """Logits float32 [..., V] of normed `x` [..., D]; `head` is [V, D] where tied, else [D, V]."""
    return jnp.einsum("...d,vd->...v" if tied else "...d,dv->...v", x, head, preferred_element_type=jnp.float32)


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
    """The matrix that `unembed` takes."""
    return params["embed"] if config.tied else params["unembed"]


def new_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty cache of `slots` for `batch` rows."""
    shape = (config.layers, batch, config.kv_heads, slots, config.head_dim)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def variables(params: Params, edits: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The collections of an `apply`: parameters and the edits {tap: Edit}."""
    tree = collection(edits, "edit")
    return {"params": params, **({"edits": tree} if tree else {})}


def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    valid: jax.Array,
    edits: Mapping[str, Any] | None = None,
    last: int | None = None,
) -> jax.Array:
    """Logits float32 [B, T, V] of left-padded `tokens` int32 [B, T] with `valid` bool [B, T].

    Pure, jittable (`config` and `last` static) and differentiable. `edits` maps a tap to an `Edit`; `last`
    keeps only the final positions.
    """
    positions = positions_of(valid)
    mask = causal_mask(jnp.arange(tokens.shape[1]), valid, config.window)
    logits, _ = Transformer(config).apply(variables(params, edits), tokens, positions, mask, last=last)
    return logits


def init(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Random parameters of a model of this `config`."""
    one = jnp.zeros((1, 1), jnp.int32)
    mask = jnp.ones((1, 1, 1), bool)
    key = jax.random.key(seed)
    return dict(Transformer(config).init(key, one, one, mask, mutable=["params"])["params"])
