"""GGUF files opened: by their content, in parts, and with headers that announce more than there is."""

import json
import struct

import gguf
import numpy as np
import pytest
from gguf_files import NAMES, byte_level_fields, random_weights, write_gguf
from transformers import AutoTokenizer

from jaxsafe.chat.model import load_chat_model
from jaxsafe.chat.tokenizer import Tokenizer
from jaxsafe.io.gguf import GgufFile
from jaxsafe.io.hf import save_hf
from jaxsafe.io.hub import load_hf
from jaxsafe.model.weights import flatten

TOKENIZER = byte_level_fields("smollm")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_split(folder, count=2):
    """The whole model in one file, and split into `count` parts as llama-gguf-split does it; returns both."""
    whole = folder / "whole.gguf"
    weights = write_gguf(whole, tokenizer=TOKENIZER)
    held, parts = list(NAMES), []
    for part in range(count):
        path = folder / f"m-{part + 1:05d}-of-{count:05d}.gguf"
        keys = {"split.no": part, "split.count": count, "split.tensors.count": len(held)}
        mine = {name: NAMES[name] for name in held[part::count]}
        write_gguf(path, keys=keys, names=mine, weights={n: weights[n] for n in mine}, tokenizer=TOKENIZER)
        parts.append(path)
    return whole, parts


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_the_parts_of_a_model_are_read_together(tmp_path, opened):
    whole, parts = write_split(tmp_path, 3)
    expected, found = load_hf(whole), load_hf(parts[opened])
    assert expected[0] == found[0]
    for path, value in flatten(expected[1]).items():
        np.testing.assert_array_equal(flatten(found[1])[path], value, err_msg=path)


def test_a_part_that_is_not_there_is_named(tmp_path):
    _, parts = write_split(tmp_path)
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"is part 1 of a model in 2 files; 'm-00002-of-00002\.gguf' is not"):
        load_hf(parts[0])
    alone = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ValueError, match=r"one part of a model in 2 files.* called NAME-00001-of-00002\.gguf"):
        load_hf(alone)


def test_a_file_is_known_by_its_content(tmp_path):
    write_gguf(tmp_path / "model.bin", tokenizer=TOKENIZER | {"tokenizer.chat_template": TEMPLATE})
    chat = load_chat_model(tmp_path / "model.bin")
    assert chat.row("hello").ids[0] == 1 and chat.config.vocab == 288


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [({}, (0, 2)), ({"eot": 5}, (0, 2, 5)), ({"eot": 5, "eom": 7}, (0, 2, 5, 7)), ({"eos": 9}, (0, 2, 9))],
)
def test_an_answer_ends_at_every_token_that_the_file_names_or_whose_text_says_so(tmp_path, keys, wanted):
    """<|endoftext|> is token 0 and <|im_end|> token 2, which llama.cpp knows by their texts."""
    fields = TOKENIZER | {f"tokenizer.ggml.{name}_token_id": number for name, number in keys.items()}
    write_gguf(tmp_path / "model.gguf", tokenizer=fields)
    assert Tokenizer(tmp_path / "model.gguf").eos_ids == wanted


@pytest.mark.parametrize("pre", ["llama3", "llama-v3", "falcon3", "pixtral", "lfm2"])
def test_other_names_of_a_way_to_cut_words(tmp_path, pre):
    text = "tell me 12345 stories"
    for name in (pre, "llama-bpe"):
        write_gguf(tmp_path / f"{name}.gguf", tokenizer=byte_level_fields(name))
    assert Tokenizer(tmp_path / f"{pre}.gguf").raw_row(text) == Tokenizer(tmp_path / "llama-bpe.gguf").raw_row(text)


def test_words_are_cut_alike_but_not_looked_up_whole_where_the_vocabulary_has_merges_alone(tmp_path):
    ids = {}
    for pre in ("llama-bpe", "dbrx", "smaug-bpe"):
        write_gguf(tmp_path / "model.gguf", tokenizer=byte_level_fields(pre))
        tokenizer = Tokenizer(tmp_path / "model.gguf").hf
        ids[pre] = tokenizer(" hello 12345", add_special_tokens=False)["input_ids"]
    assert ids["dbrx"] == ids["smaug-bpe"] != ids["llama-bpe"]
    assert len(ids["llama-bpe"]) < len(ids["dbrx"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": None}, "no key tokenizer.ggml.tokens"),
        ({"merges": None}, "no key tokenizer.ggml.merges"),
        ({"merges": ["hello"]}, "merges has 'hello'; two parts"),
        ({"tokens": [1, 2, 3]}, r"tokens is \[1, 2, 3\]; a list of str"),
        ({"token_type": [1, 2]}, "token_type has 2 entries for"),
        ({"eos_token_id": 4000}, "eos_token_id is 4000; the vocabulary has"),
    ],
)
def test_what_a_tokenizer_lacks_is_named(tmp_path, changes, words):
    fields = TOKENIZER | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    write_gguf(tmp_path / "model.gguf", tokenizer=fields)
    with pytest.raises(ValueError, match=words) as error:
        _ = Tokenizer(tmp_path / "model.gguf").eos_ids
    assert str(tmp_path / "model.gguf") in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_a_file_leaves_whole_and_comes_back(tmp_path):
    write_gguf(tmp_path / "m.gguf", "BF16", tokenizer=TOKENIZER | {"tokenizer.chat_template": TEMPLATE})
    chat = load_chat_model(tmp_path / "m.gguf")
    out = save_hf(tmp_path / "out", chat.config, chat.params, like=tmp_path / "m.gguf", card="# A card\n")
    again = load_chat_model(out)
    assert again.config == chat.config and again.tokenizer.eos_ids == chat.tokenizer.eos_ids == (0, 2)
    assert again.row("hello world 12") == chat.row("hello world 12")
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [0, 2]}
    assert AutoTokenizer.from_pretrained(out)("hello")["input_ids"] == chat.tokenizer.hf("hello")["input_ids"]
    for path, value in flatten(chat.params).items():
        np.testing.assert_array_equal(flatten(again.params)[path], value, err_msg=path)


def header(tensors=0, fields=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


def text(word):
    return struct.pack("<Q", len(word)) + word.encode()


ARRAY, UINT8, STRING = 9, 0, 8


@pytest.mark.parametrize(
    "content",
    [
        header(tensors=2**60),
        header(fields=2**60),
        header(fields=1, rest=struct.pack("<Q", 2**62)),
        header(fields=1, rest=text("general.name") + struct.pack("<IQ", STRING, 2**63)),
        header(fields=1, rest=text("a") + struct.pack("<IIQ", ARRAY, UINT8, 2**50)),
        header(fields=1, rest=text("a") + struct.pack("<IIQ", ARRAY, STRING, 2**21)),
        header(fields=1, rest=text("a") + struct.pack("<IIQ", ARRAY, UINT8, 2**23) + bytes(2**23)),
        header(fields=1, rest=text("a") + struct.pack("<I", 99)),
        header(tensors=1, rest=text("a") + struct.pack("<I", 2**31)),
        header(fields=1, rest=text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 2**21) * 2000),
    ],
    ids=range(10),
)
def test_a_header_that_announces_more_than_there_is_is_refused_before_it_is_read(tmp_path, monkeypatch, content):
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: pytest.fail("the file was read"))
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.gguf is cut off, damaged") as error:
        GgufFile(tmp_path / "model.gguf")
    assert "\n" not in str(error.value)


def test_an_empty_header_is_no_model(tmp_path):
    (tmp_path / "model.gguf").write_bytes(header())
    with pytest.raises(ValueError, match="architecture None"):
        GgufFile(tmp_path / "model.gguf")


def test_weights_of_a_file_have_their_names_once(tmp_path):
    """A tensor in two parts is no matter of which part comes last."""
    weights = random_weights(NAMES)
    for part in range(2):
        path = tmp_path / f"m-{part + 1:05d}-of-00002.gguf"
        write_gguf(path, keys={"split.no": part, "split.count": 2}, weights=weights, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="stands in two parts"):
        GgufFile(tmp_path / "m-00001-of-00002.gguf")
