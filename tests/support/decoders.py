"""Random decoders as a Hugging Face checkpoint holds them, and their logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsafe.io.tensors import load_params
from jaxsafe.model.config import ModelConfig, Rope
from jaxsafe.model.transformer import Cache, forward
from jaxsafe.model.weights import hf_shapes

LLAMA3 = Rope(10_000.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)


TINY = ModelConfig(vocab=101, layers=3, embed=32, mlp=48, heads=4, kv_heads=2, head_dim=16)


logits_of = jax.jit(forward, static_argnums=0, static_argnames="last")


def hf_weights(config, seed=0):
    """Random float32 tensors by the names and in the layouts of a Hugging Face checkpoint; every one matters."""
    generator = np.random.default_rng(seed)
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    matrices = {"self_attn.q_proj": (q, config.embed), "self_attn.k_proj": (kv, config.embed)}
    matrices |= {"self_attn.v_proj": (kv, config.embed), "self_attn.o_proj": (config.embed, q)}
    matrices |= {"mlp.gate_proj": (config.mlp, config.embed), "mlp.up_proj": (config.mlp, config.embed)}
    matrices |= {"mlp.down_proj": (config.embed, config.mlp)}
    out = {"model.embed_tokens.weight": generator.standard_normal((config.vocab, config.embed)) / 16}
    out["model.norm.weight"] = 1 + generator.standard_normal(config.embed) / 4
    if not config.tied:
        out["lm_head.weight"] = generator.standard_normal((config.vocab, config.embed)) / config.embed**0.5 / 4
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{prefix}{norm}.weight"] = 1 + generator.standard_normal(config.embed) / 4
        for name, shape in matrices.items():
            out[f"{prefix}{name}.weight"] = generator.standard_normal(shape) / shape[1] ** 0.5
            if (config.o_bias if "o_proj" in name else config.qkv_bias) if "attn" in name else config.mlp_bias:
                out[f"{prefix}{name}.bias"] = generator.standard_normal(shape[0]) / 4
    if not config.pre_norm:
        out = {name: array for name, array in out.items() if "input_layernorm" not in name}
    more = {
        name: shape for name, shape in hf_shapes(config).items() if name not in out and name.endswith("norm.weight")
    }
    out |= {name: 1 + generator.standard_normal(shape) / 4 for name, shape in more.items()}
    return {name: array.astype(np.float32) for name, array in out.items()}


class InMemory:
    """A `TensorSource` over arrays, which notes what was read of them."""

    where = "memory"

    def __init__(self, tensors):
        self.tensors = tensors
        self.reads = []

    def shapes(self):
        return {name: array.shape for name, array in self.tensors.items()}

    def read(self, name, index):
        part = self.tensors[name][index]
        self.reads.append((name, part.shape))
        return part


def random_params(config, seed=0):
    return load_params(config, InMemory(hf_weights(config, seed)))


def padded(config, lengths, seed=1, slots=None):
    """Left-padded random tokens int32 [B, T] and `valid` bool [B, T]; the padding is random too."""
    slots = slots or max(lengths)
    tokens = np.random.default_rng(seed).integers(0, config.vocab, (len(lengths), slots), np.int32)
    return tokens, np.arange(slots) >= slots - np.array(lengths)[:, None]


def replace(config, **changes):
    """`config` with other fields; `rope` is a dictionary of its fields."""
    rope = dataclasses.replace(config.rope, **changes.pop("rope", {}))
    return dataclasses.replace(config, rope=rope, **changes)


SCALED = dataclasses.replace(TINY, rope=LLAMA3)


def new_cache(config, batch, slots):
    """An empty cache of `slots` for `batch` rows."""
    shape = (config.layers, batch, config.kv_heads, slots, config.head_dim)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
