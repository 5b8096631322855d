"""GGUF files of each family, by the names and layouts of its converter, beside the same model as a folder."""

import dataclasses
import json
import pathlib

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxsafe.io.gguf import GgufFile
from jaxsafe.io.hub import load_hf
from jaxsafe.model.families import FAMILIES
from jaxsafe.model.weights import flatten

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
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
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


def write(path, family, attributes, tensors, keys):
    a = attributes
    common = {
        "block_count": a["num_hidden_layers"],
        "context_length": a["max_position_embeddings"],
        "embedding_length": a["hidden_size"],
        "feed_forward_length": a["intermediate_size"],
        "attention.head_count": a["num_attention_heads"],
        "attention.head_count_kv": a["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": a["rms_norm_eps"],
    }
    architecture = {"olmo3": "olmo2"}.get(family, family)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (common | keys).items():
        add = {list: writer.add_array, str: writer.add_string, float: writer.add_float32}.get(
            type(value), writer.add_uint32
        )
        add(f"{architecture}.{key}", value)
    for name, value in tensors.items():
        if family.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if family == "smollm3" and ".q_proj" in name:
            value = neighbours(value, a["num_attention_heads"])
        if family == "smollm3" and ".k_proj" in name:
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


@pytest.mark.parametrize("family", CASES)
def test_a_file_is_the_model_of_the_folder(family, tmp_path):
    changed, keys = CASES[family]
    attributes = json.loads((GOLDEN / family / "config.json").read_text()) | changed
    tensors = load_file(GOLDEN / family / "model.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(attributes))
    (folder / "model.safetensors").write_bytes((GOLDEN / family / "model.safetensors").read_bytes())
    write(tmp_path / "model.gguf", family, attributes, tensors, keys)
    config, params = load_hf(tmp_path / "model.gguf")
    expected, wanted = load_hf(folder)
    assert config.rope.magnitude == pytest.approx(expected.rope.magnitude, rel=1e-6)
    assert config == dataclasses.replace(
        expected, rope=dataclasses.replace(expected.rope, magnitude=config.rope.magnitude)
    )
    found = flatten(params)
    assert found.keys() == flatten(wanted).keys()
    for path, value in flatten(wanted).items():
        tolerance = 2e-7 if family.startswith("gemma") and "norm" in path else 0
        np.testing.assert_allclose(found[path], value, rtol=0, atol=tolerance, err_msg=path)


def test_every_family_with_files_is_tried():
    named = {family.gguf for family in FAMILIES.values() if family.gguf} - {"llama"}
    assert named == {{"olmo3": "olmo2"}.get(name, name) for name in CASES}


@pytest.mark.parametrize(("layers", "family"), [(46, "gemma2"), (62, "gemma3")])
def test_the_largest_gemma_models_scale_scores_by_the_width_of_a_head(layers, family, tmp_path):
    _, keys = CASES[family]
    attributes = json.loads((GOLDEN / family / "config.json").read_text()) | {"num_hidden_layers": layers}
    keys = {key: value for key, value in keys.items() if not key.endswith("_pattern")}
    embedding = {"model.embed_tokens.weight": np.zeros((64, 32), np.float32)}
    write(tmp_path / "model.gguf", family, attributes, embedding, keys)
    assert GgufFile(tmp_path / "model.gguf").attributes()["query_pre_attn_scalar"] == 32 // 4


def test_another_magnitude_of_yarn_is_refused(tmp_path):
    attributes = json.loads((GOLDEN / "qwen2" / "config.json").read_text())
    embedding = {"model.embed_tokens.weight": np.zeros((64, 32), np.float32)}
    write(tmp_path / "model.gguf", "qwen2", attributes, embedding, YARN | {"rope.scaling.attn_factor": 2.0})
    with pytest.raises(ValueError, match=r"rope.scaling.attn_factor is 2; only 1\.13863, yarn's own"):
        GgufFile(tmp_path / "model.gguf").attributes()
