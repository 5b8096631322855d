"""Metadata of GGUF files of other types and sizes than they have: read, or named in one line."""

import json
import math
import random

import numpy as np
import pytest
from gguf_families import CASES, GOLDEN, keys_of, write
from gguf_files import byte_level_fields
from mutations import read_or_named
from safetensors.numpy import load_file

from jaxsafe.io.gguf import KNOWN_KEYS, GgufFile, open_gguf

FAMILIES = ["llama", "mistral", *CASES]
SHORT = 12
"""Changes of each family's file that are tried in a usual run."""
MORE = 40
"""And in a slow one."""
VALUES = [
    *(None, True, False, 0, 1, -1, 3, 2**31 - 1, 2**40, 2**63, -(2**62)),
    *(0.5, -0.5, 1e-30, 1e30, 1e300, math.nan, math.inf, -math.inf),
    *(
        "",
        "x",
        "12",
        "yarn",
        "llama",
        [0],
        [1, 2],
        [0.5],
        [math.nan],
        ["x"],
        ["linear", ""],
        [True, False],
        [2**31 - 1] * 3,
    ),
]
OTHERS = ["general.alignment", "general.type", "split.count", "split.no", "split.tensors.count"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Its name, the attributes and tensors of a small model of it, and the keys of its file."""
    changed, keys = CASES.get(request.param, ({}, {}))
    attributes = json.loads((GOLDEN / request.param / "config.json").read_text()) | changed
    tensors = load_file(GOLDEN / request.param / "model.safetensors")
    return request.param, attributes, tensors, keys


def opened(path) -> None:
    """Reads the tokenizer and the configuration, and opens the weights."""
    file = GgufFile(path)
    file.tokenizer()
    assert file.ends
    config, tensors = open_gguf(file)
    assert config.vocab and tensors.shapes()
    for name in tensors.shapes():
        tensors.read(name, (slice(0, 2),) * len(tensors.shapes()[name]))


def fields_mutated(keys, others, seed):
    """`keys` and `others` in which one or two values, of those that are read, are of another type or size."""
    rng, keys, others = random.Random(seed), dict(keys), dict(others)
    for _ in range(rng.choice((1, 1, 2))):
        fields, names = rng.choice(((keys, sorted({*KNOWN_KEYS, *keys})), (others, [*others, *OTHERS])))
        fields[rng.choice(names)] = rng.choice(VALUES)
    return keys, others


def tried(folder, family, seed) -> bool:
    """Whether the family's file is read with the changes of `seed`; None leaves it as it is."""
    name, attributes, tensors, keys = family
    keys, others = keys_of(attributes) | keys, byte_level_fields("smollm")
    if seed is not None:
        keys, others = fields_mutated(keys, others, seed)
    path = folder / "model.gguf"
    write(path, name, attributes, tensors, keys, others)
    return read_or_named(opened, path, path, f"{name}, {seed}")


def test_changed_metadata_are_read_or_named(family, tmp_path):
    assert tried(tmp_path, family, None)
    read = [tried(tmp_path, family, seed) for seed in range(SHORT)]
    assert False in read and True in read


def test_blocks_that_no_model_has_are_refused_at_once(tmp_path):
    attributes = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
    keys = CASES["gemma3"][1] | {"attention.sliding_window_pattern": 6, "block_count": 2**31 - 1}
    write(tmp_path / "model.gguf", "gemma3", attributes, {"model.embed_tokens.weight": np.zeros((64, 32))}, keys)
    with pytest.raises(ValueError, match=r"model.gguf: .*num_hidden_layers=2147483647; a whole number up to 4096"):
        GgufFile(tmp_path / "model.gguf").config()


@pytest.mark.slow
def test_many_more_changes_are_read_or_named(family, tmp_path):
    for seed in range(SHORT, SHORT + MORE):
        tried(tmp_path, family, seed)
