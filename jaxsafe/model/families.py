"""Model families: what a Hugging Face `config.json` says, and what is refused by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxsafe.model.config import ModelConfig, Rope


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets a family apart: its Hugging Face class, and how its `config.json` is read.

    `flags` are the fields of `ModelConfig` that the family has beside the shape, with their attributes; `defaults`
    are the values of attributes that a `config.json` leaves out.
    """

    architecture: str
    flags: Mapping[str, str]
    defaults: Mapping[str, Any]


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        flags={"attn_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        defaults={
            "max_position_embeddings": 2048,
            "num_key_value_heads": None,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    "mistral": Family(
        "MistralForCausalLM",
        flags={"window": "sliding_window"},
        defaults={"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
}

# Of every family, unless it has its own.
DEFAULTS: Mapping[str, Any] = {"head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}

# Attributes that say nothing about the function from tokens to logits (besides `_private` ones and token ids).
IGNORED = frozenset(
    """
    add_cross_attention
    architectures attention_dropout auto_map chunk_size_feed_forward
    cross_attention_hidden_size dtype finetuning_task id2label
    initializer_range is_decoder is_encoder_decoder is_llama_config label2id max_length
    max_sequence_length mlp_dropout model_type output_attentions output_hidden_states
    prefix pretraining_tp problem_type residual_dropout return_dict
    task_specific_params tokenizer_class torch_dtype torchscript transformers.js_config
    transformers_version unsloth_fixed unsloth_version use_cache
    """.split()
)


# Attributes that would change the function; accepted only with the value under which they do nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1.0, 1),
    "pruned_heads": ({},),
    "quantization_config": (None,),
    "layer_types": (None,),
    "tie_encoder_decoder": (False,),
}


ROPE_KINDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def config_from_hf(attributes: Mapping[str, Any], dtype: str = "float32") -> ModelConfig:
    """The `ModelConfig` of the parsed `config.json` `attributes` (spelling of transformers 4 or 5).

    Raises ValueError, naming the attribute, for an unknown architecture, activation or RoPE type, for an
    attribute that is neither read nor known to be harmless, and for a missing one.
    """
    given = dict(attributes)
    name = given.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"model_type {name!r} is not supported; use one of {sorted(FAMILIES)}")
    family = FAMILIES[name]
    architectures = given.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise ValueError(f"architectures {architectures} is not supported; expected ['{family.architecture}']")
    defaults = {**DEFAULTS, **family.defaults}

    def take(attribute: str) -> Any:
        if attribute not in given and attribute not in defaults:
            raise ValueError(f"config.json has no {attribute!r}, which a {name} model needs")
        return given.pop(attribute, defaults.get(attribute))

    heads, embed = take("num_attention_heads"), take("hidden_size")
    head_dim = take("head_dim")
    if not head_dim and embed % heads:
        raise ValueError(f"hidden_size {embed} does not divide into {heads} heads and config.json has no head_dim")
    context = take("max_position_embeddings")
    config = ModelConfig(
        vocab=take("vocab_size"),
        layers=take("num_hidden_layers"),
        embed=embed,
        mlp=take("intermediate_size"),
        heads=heads,
        kv_heads=take("num_key_value_heads") or heads,
        head_dim=head_dim or embed // heads,
        norm_eps=take("rms_norm_eps"),
        rope=_rope_from_hf(given, context),
        tied=take("tie_word_embeddings"),
        context=context,
        family=name,
        dtype=dtype,
        **{field: take(attribute) for field, attribute in family.flags.items()},
    )
    for attribute, value in given.items():
        if attribute in NEUTRAL and value not in NEUTRAL[attribute]:
            raise ValueError(f"config.json has {attribute}={value!r}; only {NEUTRAL[attribute][0]!r} is supported")
    unknown = [
        attribute
        for attribute in sorted(given.keys() - NEUTRAL.keys() - IGNORED)
        if not attribute.startswith("_") and not attribute.endswith("_token_id")
    ]
    if unknown:
        values = ", ".join(f"{attribute}={given[attribute]!r}" for attribute in unknown)
        raise ValueError(f"config.json has attributes that a {name} model does not know: {values}")
    return config


def _rope_from_hf(given: dict[str, Any], context: int) -> Rope:
    old = given.pop("rope_scaling", None)
    rope = dict(given.pop("rope_parameters", None) or old or {})
    outer_theta = given.pop("rope_theta", None)
    theta = rope.pop("rope_theta", None) or outer_theta or 10_000.0
    old_kind = rope.pop("type", None)
    kind = rope.pop("rope_type", None) or old_kind or "default"
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope type {kind!r} is not supported; use one of {sorted(ROPE_KINDS)}")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("rope parameter partial_rotary_factor is not supported unless it is 1.0")
    if kind == "default":
        rope = {}
    numbers = ROPE_KINDS[kind]
    unknown = sorted(rope.keys() - set(numbers) - {"original_max_position_embeddings"})
    if unknown:
        raise ValueError(f"rope parameters {unknown} are not known for rope type {kind!r}; it takes {list(numbers)}")
    missing = [name for name in numbers if name not in rope and name != "original_max_position_embeddings"]
    if missing:
        raise ValueError(f"rope type {kind!r} needs {missing}, which config.json does not give")
    return Rope(
        theta=float(theta),
        kind=kind,
        factor=float(rope.get("factor", 1.0)),
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        original_context=int(rope.get("original_max_position_embeddings", context)) if kind == "llama3" else 8192,
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The attributes of a `config.json` that transformers 4 and 5 both read as `config`."""
    rope = {"rope_type": config.rope.kind}
    for name in ROPE_KINDS[config.rope.kind]:
        ours = "original_context" if name == "original_max_position_embeddings" else name
        rope[name] = getattr(config.rope, ours)
    attributes: dict[str, Any] = {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "num_hidden_layers": config.layers,
        "hidden_size": config.embed,
        "intermediate_size": config.mlp,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.kind == "default" else rope,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.context,
        "torch_dtype": config.dtype,
    }
    flags = FAMILIES[config.family].flags
    return attributes | {attribute: getattr(config, field) for field, attribute in flags.items()}
