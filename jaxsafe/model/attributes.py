"""What the attributes of a `config.json` may be, whatever the family."""

import math
from collections.abc import Callable, Mapping
from typing import Any

MOST_LAYERS = 4096


def is_size(value: Any) -> bool:
    """Whether `value` is a whole number above 0 that an index of 32 bits holds."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def is_mapping(value: Any) -> bool:
    """Whether `value` is a JSON object."""
    return isinstance(value, Mapping)


def each(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a list of what `check` lets pass."""
    return lambda value: isinstance(value, list | tuple) and all(map(check, value))


# What a value must be, how that is called, and the attributes of this kind.
KINDS: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        is_size,
        "a whole number above 0",
        """
        vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim sliding_window
        max_position_embeddings original_max_position_embeddings sliding_window_pattern no_rope_layer_interval
        """,
    ),
    (lambda value: is_size(value) and value <= MOST_LAYERS, f"a whole number up to {MOST_LAYERS}", "num_hidden_layers"),
    (lambda value: value == 0 or is_size(value), "a whole number", "max_window_layers"),
    (
        is_number,
        "a number above 0",
        """
        rms_norm_eps rope_theta rope_local_base_freq partial_rotary_factor query_pre_attn_scalar factor
        attn_logit_softcapping final_logit_softcapping low_freq_factor high_freq_factor attention_factor mscale
        mscale_all_dim beta_fast beta_slow
        """,
    ),
    (
        lambda value: isinstance(value, bool),
        "true or false",
        "tie_word_embeddings attention_bias mlp_bias use_sliding_window truncate",
    ),
    (lambda value: isinstance(value, str), "a text", "model_type type rope_type"),
    (each(lambda value: isinstance(value, str)), "a list of texts", "architectures layer_types"),
    (each(lambda value: value in (0, 1)), "a list of 0 and 1", "no_rope_layers"),
    (each(is_number), "a list of numbers above 0", "short_factor long_factor"),
    (is_mapping, "an object", "rope_scaling rope_parameters text_config full_attention sliding_attention"),
)
KIND_OF = {name: (check, called) for check, called, names in KINDS for name in names.split()}


def check_attributes(attributes: Mapping[str, Any]) -> None:
    """Raises ValueError, naming it, for an attribute whose value is of another kind; null says nothing."""
    for name, value in attributes.items():
        if name not in KIND_OF or value is None:
            continue
        check, called = KIND_OF[name]
        if not check(value):
            raise ValueError(f"config.json has {name}={value!r:.60}; {called} is expected")
        if is_mapping(value):
            check_attributes(value)
