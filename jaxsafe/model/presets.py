"""Shapes of well-known models by name, for planning and for benchmarks: no file is read.

The numbers are those of the models' `config.json`; chat and instruct variants share them.
"""

import dataclasses
import difflib

from jaxsafe.model.config import ModelConfig, Rope

LLAMA2 = ModelConfig(
    vocab=32_000,
    layers=32,
    embed=4096,
    mlp=11_008,
    heads=32,
    kv_heads=32,
    head_dim=128,
    context=4096,
    dtype="bfloat16",
)
LLAMA31 = dataclasses.replace(
    LLAMA2,
    vocab=128_256,
    mlp=14_336,
    kv_heads=8,
    rope=Rope(500_000.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
    context=131_072,
)
MISTRAL = dataclasses.replace(LLAMA2, mlp=14_336, kv_heads=8, rope=Rope(1_000_000.0), context=32_768, family="mistral")
SMOLLM2 = ModelConfig(
    vocab=49_152,
    layers=30,
    embed=576,
    mlp=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    rope=Rope(100_000.0),
    tied=True,
    context=8192,
    dtype="bfloat16",
)

PRESETS = {
    "llama2-7b": LLAMA2,
    "llama2-13b": dataclasses.replace(LLAMA2, layers=40, embed=5120, mlp=13_824, heads=40, kv_heads=40),
    "llama3.1-8b": LLAMA31,
    "llama3.1-70b": dataclasses.replace(LLAMA31, layers=80, embed=8192, mlp=28_672, heads=64),
    "llama3.1-405b": dataclasses.replace(LLAMA31, layers=126, embed=16_384, mlp=53_248, heads=128),
    "mistral-7b-v0.1": dataclasses.replace(MISTRAL, rope=Rope(10_000.0), window=4096),
    "mistral-7b-v0.2": MISTRAL,
    "mistral-7b-v0.3": dataclasses.replace(MISTRAL, vocab=32_768),
    "smollm2-135m": SMOLLM2,
}


def preset(name: str) -> ModelConfig:
    """The `ModelConfig` of the model `name`, in bfloat16. Raises ValueError for a name that is not known."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"did you mean {close[0]!r}? There are" if close else "there are"
        raise ValueError(f"model {name!r} is no preset; {hint} {', '.join(PRESETS)}")
    return PRESETS[name]
