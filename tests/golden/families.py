"""A tiny model of each family by the attributes of its `config.json`; each has all that sets its family apart."""

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default", "rope_theta": 1_000.0}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILY_MODELS = {
    "qwen2": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 11,
        "max_window_layers": 2,
    },
    "qwen2, yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "attention_bias": True},
    "gemma": {"model_type": "gemma", "head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": 11,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": 11,
        "layer_types": SLIDING,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
            "sliding_attention": PLAIN,
        },
    },
    "olmo2": {"model_type": "olmo2", "rope_parameters": PLAIN},
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 11,
        "layer_types": SLIDING,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
    },
    "phi3": {
        "model_type": "phi3",
        "sliding_window": 30,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.5, 2.5],
            "long_factor": [2.0, 4.0, 8.0],
        },
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "ministral": {"model_type": "ministral", "head_dim": 8, "sliding_window": 11, "layer_types": SLIDING},
}
FAMILY_MODELS = {name: SIZES | attributes for name, attributes in FAMILY_MODELS.items()}
