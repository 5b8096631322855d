"""GGUF files of random models, with their tokenizers."""

import gguf
import numpy as np

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]


VOCAB, LAYERS, EMBED, MLP, HEADS, KV_HEADS, HEAD_DIM = 288, 2, 64, 96, 4, 2, 16
NAMES = {
    "model.embed_tokens.weight": ("token_embd.weight", (VOCAB, EMBED)),
    "model.norm.weight": ("output_norm.weight", (EMBED,)),
    "lm_head.weight": ("output.weight", (VOCAB, EMBED)),
}

for _i in range(LAYERS):
    _hf, _gg = f"model.layers.{_i}", f"blk.{_i}"
    NAMES |= {
        f"{_hf}.input_layernorm.weight": (f"{_gg}.attn_norm.weight", (EMBED,)),
        f"{_hf}.self_attn.q_proj.weight": (f"{_gg}.attn_q.weight", (HEADS * HEAD_DIM, EMBED)),
        f"{_hf}.self_attn.k_proj.weight": (f"{_gg}.attn_k.weight", (KV_HEADS * HEAD_DIM, EMBED)),
        f"{_hf}.self_attn.v_proj.weight": (f"{_gg}.attn_v.weight", (KV_HEADS * HEAD_DIM, EMBED)),
        f"{_hf}.self_attn.o_proj.weight": (f"{_gg}.attn_output.weight", (EMBED, HEADS * HEAD_DIM)),
        f"{_hf}.post_attention_layernorm.weight": (f"{_gg}.ffn_norm.weight", (EMBED,)),
        f"{_hf}.mlp.gate_proj.weight": (f"{_gg}.ffn_gate.weight", (MLP, EMBED)),
        f"{_hf}.mlp.up_proj.weight": (f"{_gg}.ffn_up.weight", (MLP, EMBED)),
        f"{_hf}.mlp.down_proj.weight": (f"{_gg}.ffn_down.weight", (EMBED, MLP)),
    }


BIASES = {
    f"model.layers.{i}.self_attn.{hf}_proj.bias": (f"blk.{i}.attn_{gg}.bias", (size,))
    for i in range(LAYERS)
    for hf, gg, size in [
        ("q", "q", HEADS * HEAD_DIM),
        ("k", "k", KV_HEADS * HEAD_DIM),
        ("v", "v", KV_HEADS * HEAD_DIM),
        ("o", "output", EMBED),
    ]
}


KEYS = {
    "llama.block_count": LAYERS,
    "llama.context_length": 512,
    "llama.embedding_length": EMBED,
    "llama.feed_forward_length": MLP,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500_000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.eos_token_id": 2,
}


def interleaved(name, weight):
    """The rows of q and k as a GGUF file holds them: channel i of a head beside channel i + H/2."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return weight
    out = np.empty_like(weight)
    half = HEAD_DIM // 2
    for head in range(heads):
        for i in range(half):
            out[head * HEAD_DIM + 2 * i] = weight[head * HEAD_DIM + i]
            out[head * HEAD_DIM + 2 * i + 1] = weight[head * HEAD_DIM + half + i]
    return out


def random_weights(names, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, (_, shape) in names.items()}


def add_field(writer, key, value):
    """Writes `value` under `key` as the type that holds it; nothing for None."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        (writer.add_float32 if abs(value) < 1e38 or value != value else writer.add_float64)(key, value)
    elif value is not None:
        add = writer.add_int64 if value < 0 else writer.add_uint32 if value < 2**32 else writer.add_uint64
        add(key, value)


def write_gguf(
    path, kind="F32", keys=None, names=NAMES, extra=None, architecture="llama", tokenizer=None, weights=None
):
    """A GGUF file at `path`; returns its weights in Hugging Face's order of rows, before quantisation."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (KEYS | (keys or {}) | (tokenizer or {})).items():
        add_field(writer, key, value)
    weights = weights or random_weights(names)
    for name, weight in weights.items():
        type_ = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        stored = gguf.quantize(interleaved(name, weight), type_)
        writer.add_tensor(names[name][0], stored, raw_dtype=type_)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


# The last one has no role (begin, end, ...) and is known only by its type.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_letters():
    """GPT-2's printable stand-in for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def byte_level_fields(pre):
    merges = "h e|l l|he ll|hell o|Ġ w|o r|Ġw or|l d|Ġwor ld|Ġ Ġ|ĠĠ ĠĠ|Ċ Ċ|Ġ Ċ|1 2|12 3|Ġ 1|' s|Ã ©|w or|wor ld".split(
        "|"
    )
    made = [merge.replace(" ", "") for merge in merges]
    tokens = [*SPECIAL, *byte_letters().values(), *made]
    # Reached by no merge: only a tokenizer that looks whole words up first gives it.
    tokens.append("Ġhello")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
