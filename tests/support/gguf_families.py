"""GGUF files of each family, by the names and layouts of its converter."""

import pathlib

import gguf
import numpy as np
from gguf_files import add_field

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ARCHITECTURES = {"olmo3": "olmo2", "mistral": "llama"}
"""Names in files, where they are not the family's."""
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
PAIRED = ("smollm3", "llama", "mistral")
"""Families whose files have the two features that are turned together beside each other."""
# What files cannot say, put as they mean it, and the keys that say the rest.
CASES = {
    "qwen2": ({"use_sliding_window": False, "layer_types": None}, {}),
    "qwen3": ({}, {"attention.key_length": 12}),
    "gemma": ({}, {"attention.key_length": 16}),
    "gemma2": (
        {"query_pre_attn_scalar": 12},
        {
            "attention.key_length": 12,
            "attention.sliding_window": 11,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        {
            "query_pre_attn_scalar": 12,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 8.0},
                "sliding_attention": PLAIN,
            },
        },
        {
            "attention.key_length": 12,
            "attention.sliding_window": 11,
            "attention.sliding_window_pattern": [True, False, True],
            "rope.freq_base": 50_000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "olmo2": ({"rope_parameters": PLAIN}, {}),
    "olmo3": (
        {
            "rope_parameters": {
                "full_attention": {**PLAIN, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
                "sliding_attention": PLAIN,
            }
        },
        {
            "attention.sliding_window": 11,
            "attention.sliding_window_pattern": [True, False, True],
            "rope.scaling.attn_factor": 0.1 * float(np.log(4)) + 1,
            **YARN,
        },
    ),
    "phi3": (
        {},
        {
            "attention.sliding_window": 30,
            "rope.dimension_count": 6,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.attn_factor": float(np.sqrt(1 + np.log(2) / np.log(64))),
        },
    ),
    "smollm3": ({"no_rope_layers": [1, 1, 1]}, {"rope.freq_base": 2_000_000.0}),
}


def stored_name(name, family):
    inner = INNER | (SANDWICH if family.startswith(("gemma2", "gemma3", "olmo")) else {})
    stem, kind = name.rsplit(".", 1)
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{inner[part]}.{kind}"


def neighbours(weight, heads):
    """Rows with the two features that are turned together beside each other."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def keys_of(attributes):
    """The keys, under the architecture's name, that files of every family have."""
    a = attributes
    return {
        "block_count": a["num_hidden_layers"],
        "context_length": a["max_position_embeddings"],
        "embedding_length": a["hidden_size"],
        "feed_forward_length": a["intermediate_size"],
        "attention.head_count": a["num_attention_heads"],
        "attention.head_count_kv": a["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": a["rms_norm_eps"],
    }


def write(path, family, attributes, tensors, keys, others=None):
    """A GGUF file of `tensors` by Hugging Face's names; `keys` stand under the architecture's name, `others` alone."""
    a = attributes
    architecture = ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(path, architecture)
    fields = {f"{architecture}.{key}": value for key, value in (keys_of(a) | keys).items()}
    for key, value in (fields | (others or {})).items():
        add_field(writer, key, value)
    for name, value in tensors.items():
        if family.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if family in PAIRED and ".q_proj" in name:
            value = neighbours(value, a["num_attention_heads"])
        if family in PAIRED and ".k_proj" in name:
            value = neighbours(value, a["num_key_value_heads"])
        writer.add_tensor(stored_name(name, family), np.ascontiguousarray(value, np.float32))
    if family == "phi3":
        for name in ("short", "long"):
            factors = np.array(a["rope_parameters"][f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
