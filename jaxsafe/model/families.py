"""Model families: what a Hugging Face `config.json` says, and what is refused by name."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxsafe.model.attributes import check_attributes
from jaxsafe.model.config import ModelConfig, Rope

Attributes = Mapping[str, Any]
"""Of a `config.json`."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets a family apart.

    architecture: its Hugging Face class
    fixed:    fields of `ModelConfig` that all its models share
    flags:    fields of `ModelConfig` that its models differ in besides the shape, with their attributes
    defaults: the values of attributes that a `config.json` leaves out
    neutral:  attributes that are accepted with these values only, under which they do nothing
    window:   the attribute that holds the window
    switch:   the attribute without which, false, the window is ignored
    slides:   whether layer i sees the window alone where `layer_types` does not say it; None: every layer does, and
              there is no such attribute
    two_ropes: whether layers that see the window alone have rotary embeddings of their own
    fused:    tensors of files that hold several maps, rows behind rows, by name with their paths
    wrapper:  the `model_type` and the class of models with images whose `text_config` is of this family
    gguf:     the architecture of its GGUF files; `paired`: whether they hold the rotated features of a head in pairs
    """

    architecture: str
    fixed: Attributes = dataclasses.field(default_factory=dict)
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Attributes = dataclasses.field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    window: str | None = None
    switch: str | None = None
    slides: Callable[[int, Attributes], bool] | None = None
    two_ropes: bool = False
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    wrapper: tuple[str, str] | None = None
    gguf: str | None = None
    paired: bool = False


BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}


def late_layers(i: int, attributes: Attributes) -> bool:
    """Qwen's layers from `max_window_layers` on."""
    return i >= attributes["max_window_layers"]


def odd_layers(i: int, attributes: Attributes) -> bool:
    """The first layer, the third, ... of Gemma 2."""
    return i % 2 == 0


def but_every_nth(i: int, attributes: Attributes) -> bool:
    """All layers but every sixth of Gemma 3, or as `sliding_window_pattern` says."""
    return (i + 1) % attributes["sliding_window_pattern"] != 0


def but_every_fourth(i: int, attributes: Attributes) -> bool:
    """All layers but every fourth of OLMo 3."""
    return (i + 1) % 4 != 0


def unturned_layers(i: int, attributes: Attributes) -> bool:
    """The layers of SmolLM3 without rotary embeddings."""
    return not rope_layers(attributes)[i]


def rope_layers(attributes: Attributes) -> list[int]:
    """1 for layers with rotary embeddings, 0 for the others, which are every fourth unless the attributes say it."""
    every = attributes["no_rope_layer_interval"]
    return attributes["no_rope_layers"] or [int((i + 1) % every != 0) for i in range(attributes["num_hidden_layers"])]


def every_layer(i: int, attributes: Attributes) -> bool:
    """Every layer, unless `layer_types` says otherwise."""
    return True


QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        gguf="llama",
        paired=True,
        flags=BIASES | {"mlp_bias": "mlp_bias"},
        defaults={
            "max_position_embeddings": 2048,
            "num_key_value_heads": None,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    "mistral": Family(
        "MistralForCausalLM",
        gguf="llama",
        paired=True,
        defaults={"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8, "sliding_window": 4096},
        window="sliding_window",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        gguf="qwen2",
        fixed={"qkv_bias": True},
        defaults={"max_position_embeddings": 32_768, "num_key_value_heads": 32, **QWEN_WINDOW},
        window="sliding_window",
        switch="use_sliding_window",
        slides=late_layers,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        gguf="qwen3",
        fixed={"qk_norm": "head"},
        flags=BIASES,
        defaults={
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "attention_bias": False,
            **QWEN_WINDOW,
        },
        window="sliding_window",
        switch="use_sliding_window",
        slides=late_layers,
    ),
}

GEMMA = {"norm": "plus_one", "activation": "gelu_tanh", "embed_scaled": True}
GEMMA_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "attention_bias": False}
GEMMA_NEUTRAL = {
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),  # the latter means the former in Gemma's files
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "use_bidirectional_attention": (False, None),
    "cache_implementation": ("hybrid", "dynamic", "static", None),
}
SOFT_CAPS = {"softcap": "attn_logit_softcapping", "final_softcap": "final_logit_softcapping"}
FAMILIES["gemma"] = Family(
    "GemmaForCausalLM",
    gguf="gemma",
    fixed=GEMMA,
    flags=BIASES,
    defaults=GEMMA_DEFAULTS | {"max_position_embeddings": 8192, "num_key_value_heads": 16},
    neutral=GEMMA_NEUTRAL,
)
FAMILIES["gemma2"] = Family(
    "Gemma2ForCausalLM",
    gguf="gemma2",
    fixed=GEMMA | {"post_norm": True},
    flags=BIASES | SOFT_CAPS | {"query_scalar": "query_pre_attn_scalar"},
    defaults=GEMMA_DEFAULTS
    | {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "layer_types": None,
    },
    neutral=GEMMA_NEUTRAL,
    window="sliding_window",
    slides=odd_layers,
)
FAMILIES["gemma3_text"] = Family(
    "Gemma3ForCausalLM",
    gguf="gemma3",
    fixed=GEMMA | {"post_norm": True, "qk_norm": "head"},
    # Its attn_logit_softcapping is read by nothing in its attention.
    flags=BIASES | {"query_scalar": "query_pre_attn_scalar", "final_softcap": "final_logit_softcapping"},
    defaults=GEMMA_DEFAULTS
    | {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": None,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "layer_types": None,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    neutral=GEMMA_NEUTRAL | {"attn_logit_softcapping": (None,)},
    window="sliding_window",
    slides=but_every_nth,
    two_ropes=True,
    wrapper=("gemma3", "Gemma3ForConditionalGeneration"),
)
OLMO = {"norm": "float32", "pre_norm": False, "post_norm": True, "qk_norm": "projection"}
OLMO_DEFAULTS = {
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
}
FAMILIES["olmo2"] = Family("Olmo2ForCausalLM", gguf="olmo2", fixed=OLMO, flags=BIASES, defaults=OLMO_DEFAULTS)
FAMILIES["olmo3"] = Family(
    "Olmo3ForCausalLM",
    gguf="olmo2",
    fixed=OLMO,
    flags=BIASES,
    defaults=OLMO_DEFAULTS | {"sliding_window": 4096, "layer_types": None, "rope_theta": 500_000.0},
    window="sliding_window",
    slides=but_every_fourth,
    two_ropes=True,
)
FAMILIES["phi3"] = Family(
    "Phi3ForCausalLM",
    gguf="phi3",
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "partial_rotary_factor": 1.0,
    },
    neutral={
        "attention_bias": (False,),
        "embd_pdrop": (0.0,),
        "resid_pdrop": (0.0,),
        "mlp_bias": (False,),
        "lm_head_bias": (False,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
    },
    window="sliding_window",
    fused={
        "model.layers.{}.self_attn.qkv_proj.weight": ("layers/q", "layers/k", "layers/v"),
        "model.layers.{}.mlp.gate_up_proj.weight": ("layers/gate", "layers/up"),
    },
)
FAMILIES["smollm3"] = Family(
    "SmolLM3ForCausalLM",
    gguf="smollm3",
    paired=True,
    flags=BIASES | {"mlp_bias": "mlp_bias"},
    defaults={
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "rope_theta": 2_000_000.0,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    neutral={"max_window_layers": (28,)},
    window="sliding_window",
    switch="use_sliding_window",
    slides=unturned_layers,
)
FAMILIES["ministral"] = dataclasses.replace(
    FAMILIES["mistral"],
    architecture="MinistralForCausalLM",
    gguf=None,
    defaults={**FAMILIES["mistral"].defaults, "layer_types": None},
    slides=every_layer,
)
WRAPPERS = {f.wrapper[0]: name for name, f in FAMILIES.items() if f.wrapper}
"""Models with images by `model_type`, with the family of their text model."""

REFUSED = {
    "gpt_oss": "its mixture of experts and attention sinks are not implemented",
    "gemma4": "its layers share keys and values of different sizes, which are not implemented",
    "gemma4_text": "its layers share keys and values of different sizes, which are not implemented",
    "qwen3_5": "its layers of linear attention are not implemented",
    "qwen3_5_text": "its layers of linear attention are not implemented",
}
"""Families that are known and not supported, each with the reason."""

# Of every family, unless it has its own.
DEFAULTS: Attributes = {
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}

# Attributes that say nothing about the function from tokens to logits (besides `_private` ones and token ids); the
# last lines are of generation.
IGNORED = frozenset(
    """
    add_cross_attention
    architectures attention_dropout attention_probs_dropout_prob attn_implementation auto_map chunk_size_feed_forward
    cross_attention_hidden_size dtype finetuning_task hidden_dropout hidden_dropout_prob id2label
    initializer_range is_decoder is_encoder_decoder is_llama_config label2id max_length
    max_sequence_length mlp_dropout model_type num_labels output_attentions output_hidden_states
    prefix pretraining_tp problem_type residual_dropout return_dict
    task_specific_params tokenizer_class torch_dtype torchscript transformers.js_config
    transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_new_tokens min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens temperature tf_legacy_loss top_k top_p typical_p
    """.split()
)
# Attributes that differ in null from what is not there.
NULLABLE = frozenset(
    """
    attn_logit_softcapping final_logit_softcapping head_dim layer_types num_key_value_heads sliding_window
    """.split()
)


# Attributes that would change the function; accepted only with the value under which they do nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1.0, 1),
    "pruned_heads": ({},),
    "quantization_config": (None, {}),
    "layer_types": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_encoder_decoder": (False,),
}


@dataclasses.dataclass(frozen=True)
class RopeKind:
    """The numbers that a kind of rotary scaling takes: those it needs, and others with their values where absent."""

    needs: tuple[str, ...] = ()
    takes: Attributes = dataclasses.field(default_factory=dict)


ORIGINAL = "original_max_position_embeddings"
ROPE_KINDS = {
    "default": RopeKind(),
    "linear": RopeKind(("factor",)),
    "llama3": RopeKind(("factor", "low_freq_factor", "high_freq_factor"), {ORIGINAL: None}),
    "yarn": RopeKind(
        ("factor",),
        {
            ORIGINAL: None,
            "attention_factor": None,
            "mscale": None,
            "mscale_all_dim": None,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,
        },
    ),
    # Its long factors take effect behind the original context, which is the model's here.
    "longrope": RopeKind(("short_factor", "long_factor"), {ORIGINAL: None, "factor": None, "attention_factor": None}),
}


def config_from_hf(attributes: Attributes, dtype: str = "float32") -> ModelConfig:
    """The `ModelConfig` of the parsed `config.json` `attributes` (spelling of transformers 4 or 5).

    Raises ValueError, naming the attribute, for an unknown architecture, activation or RoPE type, for an
    attribute that is neither read nor known to be harmless, and for a missing one.
    """
    check_attributes(attributes)
    if attributes.get("model_type") in WRAPPERS:
        attributes = text_attributes(attributes)
    given = {key: value for key, value in attributes.items() if value is not None or key in NULLABLE}
    name = given.get("model_type")
    if name in REFUSED:
        raise ValueError(f"model_type {name!r} is not supported: {REFUSED[name]}; use one of {sorted(FAMILIES)}")
    if name not in FAMILIES:
        raise ValueError(f"model_type {name!r} is not supported; use one of {sorted(FAMILIES)}")
    family = FAMILIES[name]
    architectures = given.get("architectures") or [family.architecture]
    if [each.lower() for each in architectures] != [family.architecture.lower()]:  # LLaMAForCausalLM, at first
        raise ValueError(f"architectures {architectures} is not supported; expected ['{family.architecture}']")
    if family.slides is None and not given.get(family.window or "") and set(given.get("layer_types") or ()) == {FULL}:
        del given["layer_types"]
    known = {**DEFAULTS, **family.defaults, **given}
    read = {*family.defaults, *ROPE_ATTRIBUTES, "max_position_embeddings"}

    def take(attribute: str) -> Any:
        if attribute not in known:
            raise ValueError(f"config.json has no {attribute!r}, which a {name} model needs")
        read.add(attribute)
        return known[attribute]

    heads, embed, layers = take("num_attention_heads"), take("hidden_size"), take("num_hidden_layers")
    head_dim = take("head_dim")
    if not head_dim and embed % heads:
        raise ValueError(f"hidden_size {embed} does not divide into {heads} heads and config.json has no head_dim")
    windows = _windows_from_hf(family, known, layers)
    ropes, context = _ropes_from_hf(family, known, "sliding" in windows or windows.get("window") is not None)
    config = ModelConfig(
        vocab=take("vocab_size"),
        layers=layers,
        embed=embed,
        mlp=take("intermediate_size"),
        heads=heads,
        kv_heads=take("num_key_value_heads") or heads,
        head_dim=head_dim or embed // heads,
        norm_eps=take("rms_norm_eps"),
        tied=take("tie_word_embeddings"),
        context=context,
        family=name,
        dtype=dtype,
        **windows,
        **ropes,
        **family.fixed,
        **{field: take(attribute) for field, attribute in family.flags.items()},
    )
    _refuse_others(name, {key: value for key, value in given.items() if key not in read})
    return config


def text_attributes(attributes: Attributes) -> dict[str, Any]:
    """The attributes of the text model in those of a model with images, as a `config.json` of its own.

    Raises ValueError for another class than the wrapper's.
    """
    name = WRAPPERS[attributes["model_type"]]
    family = FAMILIES[name]
    assert family.wrapper is not None
    architectures = attributes.get("architectures") or [family.wrapper[1]]
    if architectures != [family.wrapper[1]]:
        raise ValueError(f"architectures {architectures} is not supported; expected ['{family.wrapper[1]}']")
    if not isinstance(attributes.get("text_config"), Mapping):
        raise ValueError(f"config.json has no text_config, which a {attributes['model_type']} model needs")
    shared = ("tie_word_embeddings", "quantization_config", "torch_dtype", "dtype", "eos_token_id", "bos_token_id")
    outer = {key: attributes[key] for key in shared if attributes.get(key) is not None}
    text = dict(attributes["text_config"]) | {"architectures": [family.architecture]}
    return {"model_type": name} | text | outer


def _refuse_others(name: str, others: Attributes) -> None:
    """Raises ValueError for attributes, none of which was read, that are not known to do nothing."""
    neutral = {**NEUTRAL, **FAMILIES[name].neutral}
    for attribute, value in others.items():
        if attribute in neutral and value not in neutral[attribute]:
            only = f"only {neutral[attribute][0]!r} is supported"
            raise ValueError(f"config.json of a {name} model has {attribute}={value!r}; {only}")
    unknown = [
        attribute
        for attribute in sorted(others.keys() - neutral.keys() - IGNORED)
        if not attribute.startswith("_") and not attribute.endswith("_token_id")
    ]
    if unknown:
        values = ", ".join(f"{attribute}={others[attribute]!r}" for attribute in unknown)
        raise ValueError(f"config.json has attributes that a {name} model does not know: {values}")


FULL, SLIDING = "full_attention", "sliding_attention"


def _windows_from_hf(family: Family, known: Attributes, layers: int) -> dict[str, Any]:
    """`window` and `sliding` of a model. Raises ValueError for layers of another kind, and for a missing window."""
    window = known[family.window] if family.window and known.get(family.switch or "", True) else None
    if family.slides is None:
        return {"window": window}
    default = [SLIDING if window is not None and family.slides(i, known) else FULL for i in range(layers)]
    types = known["layer_types"] or default
    if other := sorted(set(types) - {FULL, SLIDING}):
        raise ValueError(f"config.json has layer_types {other}; only {FULL!r} and {SLIDING!r} are supported")
    if len(types) < layers:
        raise ValueError(f"config.json has {len(types)} layer_types for {layers} layers")
    sliding = tuple(kind == SLIDING for kind in types[:layers])
    if any(sliding) and window is None:
        raise ValueError(f"config.json has layer_types {SLIDING!r} and no {family.window} in use")
    return {"window": window if any(sliding) else None, "sliding": () if all(sliding) or not any(sliding) else sliding}


ROPE_ATTRIBUTES = {"rope_theta", "rope_scaling", "rope_parameters"}


def _ropes_from_hf(family: Family, known: Attributes, slides: bool) -> tuple[dict[str, Any], int]:
    """`rope`, `local_rope` and `turned` of a model, and the context in which they hold."""
    context = known["max_position_embeddings"]
    old, new = known.get("rope_scaling") or {}, known.get("rope_parameters") or {}
    common = {"rope_theta": known["rope_theta"], "partial_rotary_factor": known.get("partial_rotary_factor")}
    common = {name: value for name, value in common.items() if value is not None}
    fields: dict[str, Any] = {}
    if family.two_ropes:
        local = {"rope_theta": known.get("rope_local_base_freq", known["rope_theta"])}
        whole = _rope_from_hf(common | (new.get(FULL) or old), known)
        near = _rope_from_hf(local | (new.get(SLIDING) or {}), known)
        fields["local_rope"] = near if slides and near != whole else None
    else:
        whole = _rope_from_hf(common | (new or old), known)
    if whole.partial != 1 and "partial_rotary_factor" not in family.defaults:
        raise ValueError(
            f"partial_rotary_factor={whole.partial!r} is not supported in a {known['model_type']} model; only 1.0 is"
        )
    if whole.kind == "longrope":
        context = min(context, whole.original_context)
    if "no_rope_layers" in known:
        turned = tuple(map(bool, rope_layers(known)))
        fields["turned"] = () if all(turned) else turned
    return fields | {"rope": whole}, context


def _rope_from_hf(given: Attributes, known: Attributes) -> Rope:
    """The `Rope` of the rotary parameters `given`; `known` are the attributes around them."""
    rope, context = dict(given), known["max_position_embeddings"]
    theta, partial = rope.pop("rope_theta", None) or DEFAULTS["rope_theta"], rope.pop("partial_rotary_factor", 1.0)
    old_kind = rope.pop("type", None)
    kind = rope.pop("rope_type", None) or old_kind or "default"
    if "short_factor" in rope and kind in ("su", "yarn"):
        kind = "longrope"  # as it was called in Phi's first files
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope type {kind!r} is not supported; use one of {sorted(ROPE_KINDS)}")
    if kind == "default":
        rope = {}
    needs, takes = ROPE_KINDS[kind].needs, ROPE_KINDS[kind].takes
    unknown = sorted(rope.keys() - set(needs) - takes.keys() - {ORIGINAL})
    if unknown:
        raise ValueError(f"rope parameters {unknown} are not known for rope type {kind!r}; it takes {[*needs, *takes]}")
    missing = [name for name in needs if rope.get(name) is None]
    if missing:
        raise ValueError(f"rope type {kind!r} needs {missing}, which config.json does not give")
    numbers = {**takes, **{name: value for name, value in rope.items() if value is not None}}
    original = int(known.get(ORIGINAL) or numbers.get(ORIGINAL) or context)
    made = Rope(
        theta=float(theta),
        kind=kind,
        low_freq_factor=float(numbers.get("low_freq_factor", 1.0)),
        high_freq_factor=float(numbers.get("high_freq_factor", 4.0)),
        original_context=original if ORIGINAL in takes else 8192,
        partial=float(partial),
        beta_fast=float(numbers.get("beta_fast") or 32),
        beta_slow=float(numbers.get("beta_slow") or 1),
        truncate=bool(numbers.get("truncate", True)),
        divisors=tuple(map(float, numbers.get("short_factor", ()))),
    )
    if kind == "longrope":
        return dataclasses.replace(made, magnitude=_long_magnitude(numbers, context, original))
    if kind == "yarn":
        made = dataclasses.replace(made, magnitude=_magnitude(numbers))
    return dataclasses.replace(made, factor=float(numbers.get("factor", 1.0)))


def _long_magnitude(numbers: Attributes, context: int, original: int) -> float:
    """What longrope multiplies cosines and sines by."""
    factor = numbers["factor"] or context / original
    if numbers["attention_factor"] is not None:
        return float(numbers["attention_factor"])
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _magnitude(numbers: Attributes) -> float:
    """What yarn multiplies cosines and sines by."""

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(numbers["factor"]) + 1 if numbers["factor"] > 1 else 1.0

    if numbers["attention_factor"] is not None:
        return float(numbers["attention_factor"])
    if numbers["mscale"] and numbers["mscale_all_dim"]:
        return growth(numbers["mscale"]) / growth(numbers["mscale_all_dim"])
    return growth(1)


HF_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The attributes of a `config.json` that transformers reads as `config`."""
    family = FAMILIES[config.family]
    attributes: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "num_hidden_layers": config.layers,
        "hidden_size": config.embed,
        "intermediate_size": config.mlp,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_to_hf(config.rope),
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.context,
        "torch_dtype": config.dtype,
    }
    if config.activation != "silu":
        attributes["hidden_activation"] = attributes["hidden_act"]
    if family.window:
        attributes[family.window] = config.window
    if family.switch:
        attributes[family.switch] = config.window is not None
    if family.slides:
        attributes["layer_types"] = [FULL if window is None else SLIDING for window in config.windows]
    if family.two_ropes:
        ropes = {FULL: config.rope, SLIDING: config.local_rope or config.rope}
        del attributes["rope_theta"], attributes["rope_scaling"]
        attributes["rope_parameters"] = {
            kind: (_rope_to_hf(rope) or {"rope_type": "default"}) | {"rope_theta": rope.theta}
            for kind, rope in ropes.items()
        }
    for attribute, value in _FROM_CONFIG.items():
        if attribute in family.defaults:
            attributes[attribute] = value(config)
    return attributes | {attribute: getattr(config, field) for field, attribute in family.flags.items()}


_FROM_CONFIG: Mapping[str, Callable[[ModelConfig], Any]] = {
    "partial_rotary_factor": lambda config: config.rope.partial,
    ORIGINAL: lambda config: config.rope.original_context if config.rope.kind == "longrope" else config.context,
    "no_rope_layers": lambda config: list(map(int, config.turned or (True,) * config.layers)),
}
"""What the attribute of a family that takes it says of a model."""

ROPE_FIELDS = {
    ORIGINAL: "original_context",
    "attention_factor": "magnitude",
    "short_factor": "divisors",
    "long_factor": "divisors",  # beyond the context
}
"""Fields of `Rope` whose attributes are called otherwise."""


def _rope_to_hf(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    kind = ROPE_KINDS[rope.kind]
    fields = {name: ROPE_FIELDS.get(name, name) for name in (*kind.needs, *kind.takes)}
    numbers = {name: getattr(rope, field) for name, field in fields.items() if hasattr(rope, field)}
    if rope.kind == "longrope":
        del numbers["factor"]  # of the context, which is the original one
    return {"rope_type": rope.kind} | {n: list(v) if isinstance(v, tuple) else v for n, v in numbers.items()}
