"""GGUF files of each family, by the names and layouts of its converter, beside the same model as a folder."""

import dataclasses
import json

import numpy as np
import pytest
from gguf_families import ARCHITECTURES, CASES, GOLDEN, YARN, write
from safetensors.numpy import load_file

from jaxsafe.io.gguf import GgufFile
from jaxsafe.io.hub import load_hf
from jaxsafe.model.families import FAMILIES
from jaxsafe.model.weights import flatten


@pytest.mark.parametrize("family", CASES)
def test_a_file_is_the_model_of_the_folder(family, tmp_path):
    changed, keys = CASES[family]
    attributes = json.loads((GOLDEN / family / "config.json").read_text()) | changed
    tensors = load_file(GOLDEN / family / "model.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(attributes))
    (folder / "model.safetensors").write_bytes((GOLDEN / family / "model.safetensors").read_bytes())
    write(tmp_path / "model.gguf", family, attributes, tensors, keys)
    config, params = load_hf(tmp_path / "model.gguf")
    expected, wanted = load_hf(folder)
    assert config.rope.magnitude == pytest.approx(expected.rope.magnitude, rel=1e-6)
    assert config == dataclasses.replace(
        expected, rope=dataclasses.replace(expected.rope, magnitude=config.rope.magnitude)
    )
    found = flatten(params)
    assert found.keys() == flatten(wanted).keys()
    for path, value in flatten(wanted).items():
        tolerance = 2e-7 if family.startswith("gemma") and "norm" in path else 0
        np.testing.assert_allclose(found[path], value, rtol=0, atol=tolerance, err_msg=path)


def test_every_family_with_files_is_tried():
    named = {family.gguf for family in FAMILIES.values() if family.gguf} - {"llama"}
    assert named == {ARCHITECTURES.get(name, name) for name in CASES}


@pytest.mark.parametrize(("layers", "family"), [(46, "gemma2"), (62, "gemma3")])
def test_the_largest_gemma_models_scale_scores_by_the_width_of_a_head(layers, family, tmp_path):
    _, keys = CASES[family]
    attributes = json.loads((GOLDEN / family / "config.json").read_text()) | {"num_hidden_layers": layers}
    keys = {key: value for key, value in keys.items() if not key.endswith("_pattern")}
    embedding = {"model.embed_tokens.weight": np.zeros((64, 32), np.float32)}
    write(tmp_path / "model.gguf", family, attributes, embedding, keys)
    assert GgufFile(tmp_path / "model.gguf").attributes()["query_pre_attn_scalar"] == 32 // 4


def test_another_magnitude_of_yarn_is_refused(tmp_path):
    attributes = json.loads((GOLDEN / "qwen2" / "config.json").read_text())
    embedding = {"model.embed_tokens.weight": np.zeros((64, 32), np.float32)}
    write(tmp_path / "model.gguf", "qwen2", attributes, embedding, YARN | {"rope.scaling.attn_factor": 2.0})
    with pytest.raises(ValueError, match=r"rope.scaling.attn_factor is 2; only 1\.13863, yarn's own"):
        GgufFile(tmp_path / "model.gguf").attributes()
