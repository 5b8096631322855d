"""The same SCANS run on a model from a GGUF file and from the folder that holds the same weights."""

import gguf
import numpy as np
import pytest
from gguf_files import KEYS, byte_level_fields

from configs.scans.smollm2_135m import get_config
from jaxsafe.chat.model import load_chat_model
from jaxsafe.io.hf import gguf_to_hf
from jaxsafe.records.run import read_samples
from launch.progress import Clock
from launch.scans import roles_of, run

VOCAB, EMBED, HEAD_DIM, HEADS, KV_HEADS, LAYERS = 288, 256, 64, 4, 2, 3
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MATRICES = {"attn_q": HEADS * HEAD_DIM, "attn_k": KV_HEADS * HEAD_DIM, "attn_v": KV_HEADS * HEAD_DIM}
MATRICES |= dict.fromkeys(("attn_output", "ffn_gate", "ffn_up", "ffn_down"), EMBED)


def stored(rng, rows, kind):
    """A random matrix [rows, EMBED] as the file holds it."""
    if kind != "Q4_K":
        values = (rng.standard_normal((rows, EMBED)) / 12).astype(np.float32)
        return gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    # Nobody quantises so in Python: blocks of 256 values with two scales, twelve bytes of finer ones, and half bytes.
    blocks = rng.integers(0, 256, (rows, EMBED // 256, 144), np.uint8)
    blocks[..., :4] = np.array([6e-4, 4.5e-3], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write(path, kind):
    """A lively random model of that quantisation, with its tokenizer."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": LAYERS, "context_length": 1024, "embedding_length": EMBED, "feed_forward_length": EMBED}
    sizes |= {"rope.dimension_count": HEAD_DIM, "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS}
    fields = KEYS | {f"llama.{name}": size for name, size in sizes.items()} | byte_level_fields("smollm")
    for key, value in (fields | {"tokenizer.chat_template": TEMPLATE}).items():
        adders = {str: writer.add_string, list: writer.add_array, bool: writer.add_bool, float: writer.add_float32}
        adders.get(type(value), writer.add_uint32)(key, value)
    names = {f"blk.{layer}.{name}.weight": rows for layer in range(LAYERS) for name, rows in MATRICES.items()}
    for name, rows in ({"token_embd.weight": VOCAB} | names).items():
        writer.add_tensor(name, stored(rng, rows, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
    norms = [f"blk.{layer}.{name}_norm.weight" for layer in range(LAYERS) for name in ("attn", "ffn")]
    for name in (*norms, "output_norm.weight"):
        writer.add_tensor(name, (1 + 0.2 * rng.standard_normal(EMBED)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def answered(model, out):
    """What the model answers as it is and steered, by a run of its own."""
    config = get_config()
    config.model, config.batch_size, config.max_new_tokens, config.passages = str(model), 8, 6, 2
    config.anchors = ("builtin:harmful/anchor#4", "builtin:plain/anchor#4")
    config.evaluation = ("builtin:lookalike/test#4", "builtin:harmful/test#4")
    config.calibration, config.layers, config.scored, config.threshold, config.alpha = (), (0, 2), (0, 3), 0.5, 0.5
    run(config, load_chat_model(config.model), roles_of(config), out, Clock())
    return [(s.variant, s.prompt, s.text, s.score) for s in read_samples(out)]


@pytest.mark.slow
def test_answers_do_not_depend_on_the_format_of_the_same_weights(tmp_path):
    seen = []
    for kind in ("F16", "Q8_0", "Q4_K"):
        file = write(tmp_path / f"{kind}.gguf", kind)
        folder = gguf_to_hf(file, tmp_path / f"{kind} folder")
        answers = answered(file, tmp_path / f"{kind} of the file")
        assert answers == answered(folder, tmp_path / f"{kind} of the folder"), kind
        assert len({text for _, _, text, _ in answers}) > 4, "a model that says the same to all would prove little"
        seen.append(answers)
    assert seen[0] != seen[2]
