"""Configurations: read from every spelling of `config.json`, written again, refused by name where not understood."""

import dataclasses
import json

import pytest
from transformers import LlamaConfig, MistralConfig

from jaxsafe.io.hf import read_config
from jaxsafe.model.config import ModelConfig, Rope
from jaxsafe.model.families import config_from_hf, config_to_hf

# What the public repositories of these models hold.
LLAMA2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-chat-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA31 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA32_1B = LLAMA31 | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA31["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LATER_MISTRAL = {"attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
VICUNA = LLAMA2 | {"_name_or_path": "vicuna-7b-v1.5", "pad_token_id": 0, "transformers_version": "4.31.0"}
LLAMA2_READ = ModelConfig(32000, 32, 4096, 11008, 32, 32, 128, context=4096)
LLAMA3_ROPE = Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
LLAMA31_READ = ModelConfig(128256, 32, 4096, 14336, 32, 8, 128, rope=LLAMA3_ROPE, context=131072)
LLAMA32_READ = dataclasses.replace(
    LLAMA31_READ,
    layers=16,
    embed=2048,
    mlp=8192,
    head_dim=64,
    tied=True,
    rope=dataclasses.replace(LLAMA3_ROPE, factor=32.0),
)
MISTRAL_READ = ModelConfig(32000, 32, 4096, 14336, 32, 8, 128, window=4096, context=32768, family="mistral")
LATER_READ = dataclasses.replace(MISTRAL_READ, window=None, rope=Rope(1_000_000.0))
SMOLLM2_READ = ModelConfig(49152, 30, 576, 1536, 9, 3, 64, rope=Rope(100_000.0), tied=True, context=8192)
PUBLIC = {
    "Llama 2 chat": (LLAMA2, LLAMA2_READ),
    "Llama 3.1": (LLAMA31, LLAMA31_READ),
    "Llama 3.2 1B": (LLAMA32_1B, LLAMA32_READ),
    "Mistral v0.1": (MISTRAL, MISTRAL_READ),
    "Mistral Instruct v0.2": (MISTRAL | LATER_MISTRAL | {"transformers_version": "4.36.0"}, LATER_READ),
    "Mistral v0.3": (MISTRAL | LATER_MISTRAL | {"vocab_size": 32768}, dataclasses.replace(LATER_READ, vocab=32768)),
    "SmolLM2 135M Instruct": (SMOLLM2, SMOLLM2_READ),
    "Vicuna 1.5": (VICUNA, LLAMA2_READ),
    "Vicuna 1.5 16k": (
        VICUNA | {"max_sequence_length": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        dataclasses.replace(LLAMA2_READ, rope=Rope(kind="linear", factor=4.0)),
    ),
}
TINY = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_models(name):
    attributes, expected = PUBLIC[name]
    before = json.dumps(attributes)
    assert config_from_hf(attributes) == expected
    assert json.dumps(attributes) == before


@pytest.mark.parametrize(
    "config",
    [
        LLAMA31_READ,
        LLAMA32_READ,
        MISTRAL_READ,
        LATER_READ,
        SMOLLM2_READ,
        ModelConfig(
            64, 2, 32, 48, 4, 1, 20, rope=Rope(500.0, "linear", 3.0), qkv_bias=True, o_bias=True, norm_eps=1e-6
        ),
        ModelConfig(64, 2, 32, 48, 4, 4, 8, mlp_bias=True, rope=Rope(1e4, "llama3", 4.0, 1.5, 3.0, 77), context=99),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_and_read_again(config, dtype, tmp_path):
    config = dataclasses.replace(config, dtype=dtype)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    assert read_config(tmp_path) == config


@pytest.mark.parametrize("name", PUBLIC)
def test_transformers_reads_what_is_written(name):
    ours = PUBLIC[name][1]
    theirs = (MistralConfig if ours.family == "mistral" else LlamaConfig)(**config_to_hf(ours))
    assert config_from_hf(theirs.to_dict()) == ours
    assert config_from_hf(theirs.to_diff_dict()) == ours


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig])
def test_absent_attributes_mean_what_they_mean_in_transformers(kind):
    given = TINY | {"model_type": kind.model_type}
    if kind is MistralConfig:
        given["num_attention_heads"] = 16
    defaults = {k: v for k, v in given.items() if k != "model_type"}
    assert config_from_hf(given) == config_from_hf(kind(**defaults).to_dict())


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2}},
        {"rope_theta": 7, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}},
        {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 7.0}, "rope_scaling": None},
        {"rope_theta": 9.0, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}},
    ],
)
def test_spellings_of_rope(spelling):
    assert config_from_hf(TINY | spelling).rope == Rope(theta=7.0, kind="linear", factor=2.0)


@pytest.mark.parametrize(
    ("spelling", "rope"),
    [
        ({}, Rope()),
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, Rope(5e5)),
        ({"rope_scaling": {"rope_type": "default"}, "partial_rotary_factor": 1.0}, Rope()),
    ],
)
def test_spellings_of_plain_rope(spelling, rope):
    assert config_from_hf(TINY | spelling).rope == rope


def test_llama3_rope_without_an_original_context_takes_the_context():
    scaling = {k: v for k, v in LLAMA31["rope_scaling"].items() if k != "original_max_position_embeddings"}
    given = LLAMA31 | {"rope_scaling": scaling, "max_position_embeddings": 4096}
    assert config_from_hf(given).rope.original_context == 4096


EXTRAS = {
    "_attn_implementation_autoset": True,
    "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    "dtype": "bfloat16",
    "id2label": {"0": "LABEL_0"},
    "layer_types": None,
    "output_attentions": False,
    "pad_token_id": 128004,
    "quantization_config": None,
    "residual_dropout": 0.0,
    "sep_token_id": None,
    "unsloth_fixed": True,
    "unsloth_version": "2024.9",
    "use_cache": False,
    "architectures": ["LLaMAForCausalLM"],
    "attn_implementation": "sdpa",
    "bad_words_ids": None,
    "do_sample": False,
    "hidden_dropout": 0.0,
    "num_labels": 2,
    "sliding_window": None,
    "top_k": 50,
    "use_sliding_window": False,
    "whatever_comes": None,
}


@pytest.mark.parametrize("name", EXTRAS)
def test_harmless_extras_are_accepted(name):
    assert config_from_hf(LLAMA31 | {name: EXTRAS[name]}) == LLAMA31_READ


@pytest.mark.parametrize("quiet", [{"layer_types": ["full_attention"] * 2}, {"quantization_config": {}}])
def test_values_that_change_nothing_are_accepted(quiet):
    assert config_from_hf(TINY | quiet) == config_from_hf(TINY)


def test_a_mistral_model_without_biases_may_say_so():
    mistral = TINY | {"model_type": "mistral", "num_key_value_heads": 2}
    assert config_from_hf(mistral | {"attention_bias": False, "mlp_bias": False}) == config_from_hf(mistral)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hidden_size": "64"}, "hidden_size='64'; a whole number above 0 is expected"),
        ({"vocab_size": 2**40}, "vocab_size=1099511627776; a whole number"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers=5000; a whole number up to 4096"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan; a number above 0"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0"),
        ({"attention_bias": "no"}, "attention_bias='no'; true or false"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM'; a list of texts"),
        ({"rope_scaling": ["linear"]}, r"rope_scaling=\['linear'\]; an object"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_type=\['linear'\]; a text"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor='2'; a number"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
    ],
)
def test_values_of_another_kind_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        config_from_hf(TINY | given)


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model_type": "gpt2"}, ["model_type", "'gpt2'", "'llama'", "'mistral'"]),
        ({"model_type": None}, ["model_type", "None", "'llama'"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", "LlamaForCausalLM"]),
        ({"architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "LlamaForCausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"attention_multiplier": 0.5}, ["attention_multiplier=0.5"]),
        ({"embedding_multiplier": 12, "logits_scaling": 8}, ["embedding_multiplier=12", "logits_scaling=8"]),
        ({"sliding_window": 128}, ["llama", "sliding_window=128"]),
        ({"model_type": "mistral", "num_key_value_heads": 2, "attention_bias": True}, ["attention_bias=True"]),
        ({"rope_interleaved": True}, ["rope_interleaved", "True"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"pruned_heads": {"0": [1]}}, ["pruned_heads", "{'0': [1]}"]),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, ["'ntk'", "'llama3'", "'linear'"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["'dynamic'"]),
        ({"rope_parameters": LINEAR | {"beta_fast": 32}}, ["beta_fast", "'linear'"]),
        ({"rope_parameters": LINEAR | {"partial_rotary_factor": 0.25}}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["'linear'", "factor"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": None}}, ["'yarn'", "factor"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, ["high_freq_factor"]),
        ({"num_key_value_heads": 3}, ["4 attention heads", "3 key/value heads"]),
        ({"head_dim": 7}, ["head_dim", "7", "even"]),
        ({"hidden_size": 66, "head_dim": None}, ["hidden_size 66", "4 heads", "no head_dim"]),
    ],
)
def test_refused_by_name(given, words):
    with pytest.raises(ValueError) as error:
        config_from_hf(TINY | given)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(TINY.keys() - {"model_type"}))
def test_a_missing_size_is_named(name):
    with pytest.raises(ValueError, match=f"config.json has no '{name}'"):
        config_from_hf({k: v for k, v in TINY.items() if k != name})


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=f"'{dtype}'.*'float32' or 'bfloat16'"):
        config_from_hf(TINY, dtype)


@pytest.mark.parametrize(
    ("stored", "asked", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, None, "bfloat16"),
        ({"dtype": "bfloat16"}, None, "bfloat16"),
        ({"torch_dtype": "float16"}, None, "float32"),
        ({}, None, "float32"),
        ({"torch_dtype": "bfloat16"}, "float32", "float32"),
        ({"torch_dtype": "float32"}, "bfloat16", "bfloat16"),
    ],
)
def test_dtype_of_a_folder(stored, asked, dtype, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | stored))
    assert read_config(tmp_path, asked).dtype == dtype


def test_a_folder_without_a_usable_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*; a Hugging Face model folder has one"):
        read_config(tmp_path)
    file = tmp_path / "config.json"
    for text, words in [
        ("{", "is not JSON"),
        ("\udcff", "is not JSON"),
        (json.dumps(TINY | {"hidden_act": "relu"}), "hidden_act='relu'"),
    ]:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=words) as error:
            read_config(tmp_path)
        assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_groups():
    assert (LLAMA2_READ.groups, LLAMA31_READ.groups, SMOLLM2_READ.groups) == (1, 4, 3)
