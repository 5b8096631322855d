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

QWEN25 = ModelConfig(
    vocab=152_064,
    layers=28,
    embed=3584,
    mlp=18_944,
    heads=28,
    kv_heads=4,
    head_dim=128,
    norm_eps=1e-6,
    rope=Rope(1_000_000.0),
    qkv_bias=True,
    context=32_768,
    family="qwen2",
    dtype="bfloat16",
)
QWEN3 = dataclasses.replace(
    QWEN25,
    vocab=151_936,
    layers=36,
    embed=4096,
    mlp=12_288,
    heads=32,
    kv_heads=8,
    qkv_bias=False,
    qk_norm="head",
    context=40_960,
    family="qwen3",
)
GEMMA2 = ModelConfig(
    vocab=256_000,
    layers=42,
    embed=3584,
    mlp=14_336,
    heads=16,
    kv_heads=8,
    head_dim=256,
    norm_eps=1e-6,
    window=4096,
    sliding=(True, False) * 21,
    tied=True,
    post_norm=True,
    norm="plus_one",
    activation="gelu_tanh",
    embed_scaled=True,
    query_scalar=256,
    softcap=50.0,
    final_softcap=30.0,
    context=8192,
    family="gemma2",
    dtype="bfloat16",
)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    vocab=262_208,
    layers=34,
    embed=2560,
    mlp=10_240,
    heads=8,
    kv_heads=4,
    rope=Rope(1_000_000.0, "linear", factor=8.0),
    local_rope=Rope(10_000.0),
    window=1024,
    sliding=tuple((i + 1) % 6 != 0 for i in range(34)),
    qk_norm="head",
    softcap=None,
    final_softcap=None,
    context=131_072,
    family="gemma3_text",
)
OLMO3 = dataclasses.replace(
    LLAMA2,
    vocab=100_278,
    norm_eps=1e-6,
    rope=Rope(500_000.0, "yarn", factor=8.0, original_context=8192, magnitude=1.2079441541679836),
    local_rope=Rope(500_000.0),
    window=4096,
    sliding=tuple((i + 1) % 4 != 0 for i in range(32)),
    pre_norm=False,
    post_norm=True,
    qk_norm="projection",
    norm="float32",
    context=65_536,
    family="olmo3",
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
    "qwen2.5-7b": QWEN25,
    "qwen3-8b": QWEN3,
    "gemma-2-9b": GEMMA2,
    "gemma-3-4b": GEMMA3,
    "olmo-3-7b": OLMO3,
}


def preset(name: str) -> ModelConfig:
    """The `ModelConfig` of the model `name`, in bfloat16. Raises ValueError for a name that is not known."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"did you mean {close[0]!r}? There are" if close else "there are"
        raise ValueError(f"model {name!r} is no preset; {hint} {', '.join(PRESETS)}")
    return PRESETS[name]
