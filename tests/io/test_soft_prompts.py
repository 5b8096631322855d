"""Soft prompts through files."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxsafe.io.soft_prompts import load_soft_prompt, save_soft_prompt
from jaxsafe.model.soft_prompt import soft_prompt

MADE_FOR = {"configuration": "0123", "sketch": {"layers/q": [2.0, 1.0, -1.0], "norm": [1.0, 0.5, 0.5]}}
VECTORS = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)


def test_what_was_saved_is_loaded(tmp_path):
    path, metadata = tmp_path / "new" / "p.safetensors", {"model": "tiny", "origin": MADE_FOR, "system": "Be kind."}
    save_soft_prompt(path, soft_prompt(VECTORS, 2), metadata)
    found, meta = load_soft_prompt(path, MADE_FOR)
    assert meta == metadata and found.first.tolist() == [2]
    np.testing.assert_array_equal(found.vectors[0], VECTORS)
    with pytest.raises(ValueError, match="was made for 'tiny', a model of another configuration"):
        load_soft_prompt(path, MADE_FOR | {"configuration": "other"})


def test_vectors_in_another_order_of_memory_are_saved_as_they_are(tmp_path):
    save_soft_prompt(tmp_path / "p", soft_prompt(np.asfortranarray(VECTORS), 0), {})
    np.testing.assert_array_equal(load_soft_prompt(tmp_path / "p")[0].vectors[0], VECTORS)


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ({"vectors": VECTORS}, "holds no soft prompt"),
        ({"vectors": VECTORS[0], "first": np.int32(1)}, r"vectors float32 \[3\]"),
        ({"vectors": VECTORS.astype(np.float16), "first": np.int32(1)}, "vectors float16"),
        ({"vectors": VECTORS, "first": np.int32(-1)}, "are no soft prompt"),
        ({"vectors": VECTORS[:0], "first": np.int32(1)}, r"vectors float32 \[0, 3\]"),
        ({"vectors": VECTORS * np.inf, "first": np.int32(1)}, "not finite"),
    ],
)
def test_other_files_are_refused(tmp_path, arrays, what):
    path = tmp_path / "p.safetensors"
    save_file({k: np.asarray(v) for k, v in arrays.items()}, path, metadata={"jaxsafe": json.dumps({})})
    with pytest.raises(ValueError, match=what):
        load_soft_prompt(path)


def test_a_missing_and_a_torn_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no soft prompt at"):
        load_soft_prompt(tmp_path / "none")
    save_soft_prompt(tmp_path / "p", soft_prompt(VECTORS, 2), {})
    (tmp_path / "p").write_bytes((tmp_path / "p").read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_soft_prompt(tmp_path / "p")
