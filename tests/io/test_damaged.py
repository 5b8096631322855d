"""Model files as accidents leave them: they load, or end in one line that names a file."""

import json
import pathlib
import warnings

import pytest
from folders import write_folder
from gguf_files import byte_level_fields, write_gguf
from mutations import bytes_mutated, json_bytes, json_mutated, read_or_named, try_seed
from tiny import tiny_config, tiny_tokenizer

from jaxsafe.chat.model import load_chat_model
from jaxsafe.chat.tokenizer import Tokenizer
from jaxsafe.io.hf import save_hf
from jaxsafe.io.hub import load_hf

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SHORT = 120
"""Changes of each file that are tried in a usual run."""
MORE = 150
"""And in a slow one; a seed changes 13 things, and the three files of damages make ten thousand changes."""
JSON = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
]
BYTES = [*JSON, "chat_template.jinja", "model-00001.safetensors", "model.gguf"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of a small model in two shards with all of its files, and a GGUF file in it."""
    folder = write_folder(tmp_path_factory.mktemp("whole"), tiny_config(layers=1))
    tiny_tokenizer(folder, eos=[2, 6])
    config, params = load_hf(folder)
    shards = save_hf(tmp_path_factory.mktemp("shards") / "m", config, params, shard_bytes=30_000)
    (folder / "model.safetensors").unlink()
    for file in shards.glob("model*"):
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = byte_level_fields("smollm") | {"tokenizer.chat_template": TEMPLATE}
    write_gguf(folder / "model.gguf", "Q8_0", tokenizer=tokenizer)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of the folder in which files may be changed."""
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def asked(path: pathlib.Path) -> None:
    """Loads the model at `path`, asks it and reads an answer."""
    chat = load_chat_model(path)
    chat.rows(["Why? <|end|> 12"])
    read(path)


def read(path: pathlib.Path) -> None:
    """Opens the tokenizer at `path`, asks by it and reads an answer."""
    tokenizer = Tokenizer(path)
    tokenizer.rows(["Why? <|end|> 12"], responses=["Because."])
    tokenizer.decode([[5, 9, 40]], [3])
    tokenizer.check_vocabulary(tokenizer.eos_ids, 300)


# What each file is read for.
READERS = dict.fromkeys(BYTES, read) | {"config.json": asked, "model.gguf": asked}
READERS |= {"model-00001.safetensors": load_hf, "model.safetensors.index.json": load_hf}


def tried(folder, name, content, said):
    """Whether the model loads with the file `name` of this `content`; see `read_or_named`."""
    file = folder / name
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            at = file if name == "model.gguf" else folder
            return read_or_named(READERS[name], at, at, said)
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("name", BYTES)
def test_changed_bytes_are_read_or_named(folder, name):
    data = (folder / name).read_bytes()
    loaded = [tried(folder, name, bytes_mutated(data, seed), f"{name}, bytes {seed}") for seed in range(SHORT)]
    assert False in loaded and True in loaded


@pytest.mark.parametrize("name", JSON)
def test_changed_values_are_read_or_named(folder, name):
    content = json.loads((folder / name).read_text())
    loaded = [
        tried(folder, name, json_bytes(json_mutated(content, seed)), f"{name}, values {seed}") for seed in range(SHORT)
    ]
    assert False in loaded and True in loaded


@pytest.mark.slow
def test_many_more_changes_are_read_or_named(folder):
    for seed in range(SHORT, SHORT + MORE):
        try_seed(folder, BYTES, JSON, tried, seed)
