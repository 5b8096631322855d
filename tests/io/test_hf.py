"""Hugging Face folders: every bit comes back, every tensor is accounted for, nothing is half-written."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from decoders import TINY, InMemory, hf_weights, logits_of, padded, random_params
from folders import stored, write_folder, write_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxsafe.io import hf
from jaxsafe.io.hf import SafetensorsFolder, read_config, save_hf
from jaxsafe.io.hub import load_hf
from jaxsafe.io.shards import INDEX
from jaxsafe.io.tensors import load_params
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.weights import TABLE, from_matrix, hf_shapes, hf_view, layer_shape, to_matrix
from jaxsafe.parallel import parse_mesh

HALF = dataclasses.replace(TINY, dtype="bfloat16")
CONFIGS = {
    "untied": HALF,
    "tied": dataclasses.replace(HALF, tied=True),
    "biases": dataclasses.replace(HALF, qkv_bias=True, o_bias=True, mlp_bias=True, vocab=104),
    "mistral": dataclasses.replace(HALF, family="mistral", window=8, kv_heads=1),
    "float32": dataclasses.replace(TINY, tied=True),
}


def bits(tensors):
    return {name: (array.shape, str(array.dtype), np.asarray(array).tobytes()) for name, array in tensors.items()}


def all_tensors(folder):
    """{name: array} of all files of `folder`; each name may stand in one of them only."""
    parts = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    whole = {name: array for part in parts for name, array in part.items()}
    assert len(whole) == sum(map(len, parts))
    return whole


# Round trips


@pytest.mark.parametrize("mesh", [None, "data:-1,model:2"], ids=["one device", "4 x 2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_byte_identical(name, mesh, tmp_path):
    source = write_folder(tmp_path / "source", CONFIGS[name])
    config, params = load_hf(source, mesh=mesh and parse_mesh(mesh))
    assert dataclasses.replace(config, stream=None) == CONFIGS[name]
    out = save_hf(tmp_path / "out", config, params, like=source)
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("shard_bytes", [1, 5_000, 30_000])
def test_shards_hold_everything_once(shard_bytes, tmp_path):
    config = CONFIGS["biases"]
    tensors = stored(config)
    params = load_params(config, InMemory(tensors))
    out = save_hf(tmp_path / "out", config, params, shard_bytes=shard_bytes)
    assert bits(all_tensors(out)) == bits(tensors)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    for file in files:
        part = load_file(file)
        assert part
        assert len(part) == 1 or sum(array.nbytes for array in part.values()) <= shard_bytes
    again, _ = load_hf(save_hf(tmp_path / "again", *load_hf(out), shard_bytes=shard_bytes * 2))
    assert dataclasses.replace(again, stream=None) == config
    assert bits(all_tensors(tmp_path / "again")) == bits(tensors)


def test_arrays_on_the_host_are_saved_as_well(tmp_path):
    """NumPy's transposes are views, which safetensors would store as if they were contiguous."""
    out = save_hf(tmp_path / "out", HALF, jax.device_get(random_params(HALF)))
    assert bits(all_tensors(out)) == bits(stored(HALF))


def test_one_file_where_everything_fits(tmp_path):
    params = random_params(HALF)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert [p.name for p in save_hf(tmp_path / "a", HALF, params, shard_bytes=size).glob("model*")] == [
        "model.safetensors"
    ]
    assert len(list(save_hf(tmp_path / "b", HALF, params, shard_bytes=size - 1).glob("*.safetensors"))) > 1


def test_parameters_of_another_dtype_are_saved_whole(tmp_path):
    """Wider than the configuration says, they still fall into files of their own size and names of their own."""
    tensors = hf_weights(HALF)
    params = load_params(TINY, InMemory(tensors))
    limit = sum(array.nbytes for array in tensors.values()) * 3 // 4
    out = save_hf(tmp_path / "out", HALF, params, shard_bytes=limit)
    assert bits(all_tensors(out)) == bits(tensors)


@pytest.mark.parametrize("name", ["untied", "tied", "biases"])
def test_the_view_has_every_name_and_shape(name):
    config, tensors = CONFIGS[name], stored(CONFIGS[name])
    assert hf_shapes(config) == {key: array.shape for key, array in tensors.items()}
    view = hf_view(config, load_params(config, InMemory(tensors)))
    assert bits({key: np.ascontiguousarray(array) for key, array in view.items()}) == bits(tensors)
    part = hf_view(config, {"layers": {"o": np.zeros((config.layers, 4, 16, 32))}})
    assert {key: a.shape for key, a in part.items()} == {
        f"model.layers.{layer}.self_attn.o_proj.weight": (32, 64) for layer in range(3)
    }


def test_heads_are_the_slow_axis_of_a_flat_one():
    tensors, layers = stored(HALF), random_params(HALF)["layers"]
    for name, heads in (("q", 4), ("k", 2), ("v", 2)):
        for head in range(heads):
            rows = tensors[f"model.layers.2.self_attn.{name}_proj.weight"][head * 16 : head * 16 + 16]
            np.testing.assert_array_equal(layers[name][2, :, head, :], rows.T)
    columns = tensors["model.layers.2.self_attn.o_proj.weight"][:, 16:32]
    np.testing.assert_array_equal(layers["o"][2, 1], columns.T)


# What a model has that has a weight of these needs.
WITH = {"head_norm": {"qk_norm": "head"}, "projection_norm": {"qk_norm": "projection"}}
WITH |= {needs: {"post_norm": True} for needs in ("post_norm", "sandwich")}


@settings(max_examples=40, deadline=None)
@given(
    weight=st.sampled_from(TABLE),
    sizes=st.tuples(*[st.integers(1, 4)] * 4),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (2, 2)]),
)
def test_named_axes_and_matrices_are_inverses(weight, sizes, heads):
    vocab, embed, mlp, half = sizes
    more = WITH.get(weight.needs, {})
    config = ModelConfig(vocab, 1, embed, mlp, *heads, 2 * half, qkv_bias=True, o_bias=True, mlp_bias=True, **more)
    named = np.arange(np.prod(layer_shape(config, weight)), dtype=np.float32).reshape(layer_shape(config, weight))
    matrix = to_matrix(config, weight, named)
    assert matrix.shape == hf_shapes(config)[weight.hf.format(0)]
    np.testing.assert_array_equal(from_matrix(config, weight, matrix), named)
    np.testing.assert_array_equal(to_matrix(config, weight, from_matrix(config, weight, matrix)), matrix)
    if weight.linear:
        x = np.random.default_rng(0).standard_normal([getattr(config, axis) for axis in weight.inputs])
        by_name = np.tensordot(x, named, x.ndim)
        np.testing.assert_allclose(by_name.reshape(-1), matrix @ x.reshape(-1), rtol=1e-5, atol=1e-5)


# What a folder must hold


def refused(folder, *words, kind=ValueError):
    with pytest.raises(kind) as error:
        load_hf(folder)
    assert all(str(word) in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


Q1 = "model.layers.1.self_attn.q_proj.weight"


def test_a_missing_tensor_is_named(tmp_path):
    tensors = stored(HALF)
    del tensors[Q1]
    refused(write_folder(tmp_path / "m", HALF, tensors), tmp_path / "m", "lacks 1 tensors", Q1)


def test_a_missing_bias_is_named(tmp_path):
    biased = dataclasses.replace(HALF, qkv_bias=True, o_bias=True)
    refused(write_folder(tmp_path / "m", biased, stored(HALF)), "lacks 12 tensors", "self_attn.k_proj.bias")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_norm.weight", "model.layers.3.mlp.up_proj.weight"])
def test_an_unknown_tensor_is_named(name, tmp_path):
    tensors = stored(HALF) | {name: np.zeros(16, ml_dtypes.bfloat16)}
    refused(write_folder(tmp_path / "m", HALF, tensors), tmp_path / "m", "1 tensors that a llama model lacks", name)


def test_a_bias_that_the_config_does_not_announce_is_refused(tmp_path):
    tensors = stored(dataclasses.replace(HALF, qkv_bias=True, o_bias=True))
    refused(write_folder(tmp_path / "m", HALF, tensors), "12 tensors that a llama model lacks", "k_proj.bias")


def test_derived_buffers_and_a_tied_head_are_no_strangers(tmp_path):
    config = CONFIGS["tied"]
    tensors = stored(config)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    more["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    source = write_folder(tmp_path / "m", config, tensors | more)
    out = save_hf(tmp_path / "out", *load_hf(source), like=source)
    assert bits(all_tensors(out)) == bits(tensors)


def test_a_wrong_shape_is_named(tmp_path):
    tensors = stored(HALF)
    tensors[Q1] = np.ascontiguousarray(tensors[Q1].T)
    refused(write_folder(tmp_path / "m", HALF, tensors), Q1, "[32, 64]", "[64, 32]")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [Q1, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_value_that_is_not_finite_is_named(name, value, tmp_path):
    tensors = stored(HALF)
    tensors[name].reshape(-1)[-1] = value
    refused(write_folder(tmp_path / "m", HALF, tensors), tmp_path / "m", name, "not finite")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_named(kept, tmp_path):
    file = write_folder(tmp_path / "m", HALF) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(tmp_path / "m", file, "not a whole safetensors file")


def test_pickled_weights_are_not_read(tmp_path):
    folder = write_folder(tmp_path / "m", HALF)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, folder, "no *.safetensors", ".bin", kind=FileNotFoundError)


def test_a_tensor_in_two_files_is_named(tmp_path):
    out = save_hf(tmp_path / "out", HALF, random_params(HALF), shard_bytes=10_000)
    holding = json.loads((out / INDEX).read_text())["weight_map"][Q1]
    other = next(file for file in sorted(out.glob("*.safetensors")) if file.name != holding)
    save_file(load_file(other) | {Q1: stored(HALF)[Q1]}, other)
    refused(out, Q1, "two files")


def test_a_shard_that_is_gone_is_named(tmp_path):
    out = save_hf(tmp_path / "out", HALF, random_params(HALF), shard_bytes=10_000)
    gone = sorted(out.glob("*.safetensors"))[1]
    gone.unlink()
    refused(out, out, "lacks 1 files", gone.name, kind=FileNotFoundError)


def test_what_the_index_names_is_read_and_nothing_else(tmp_path):
    out = save_hf(tmp_path / "out", HALF, random_params(HALF), shard_bytes=10_000)
    save_file({"layers.0.attention.wk.weight": stored(HALF)[Q1]}, out / "consolidated.safetensors")
    assert bits(hf_view(*load_hf(out))) == bits(stored(HALF))


def test_one_whole_file_is_read_and_nothing_else(tmp_path):
    folder = write_folder(tmp_path / "m", HALF)
    save_file({Q1: stored(HALF)[Q1]}, folder / "adapter_model.safetensors")
    assert bits(hf_view(*load_hf(folder))) == bits(stored(HALF))


@pytest.mark.parametrize("weight_map", [None, {}, [1], {Q1: 3}, {Q1: "../elsewhere.safetensors"}])
def test_an_index_that_is_none_is_named(weight_map, tmp_path):
    folder = write_folder(tmp_path / "m", HALF)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, folder / INDEX)


@pytest.mark.parametrize("kind", [np.float16, np.float64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_weights_of_other_floating_types_are_read_as_they_are(kind, tmp_path):
    narrow = {name: array.astype(kind) if array.ndim == 2 else array for name, array in stored(TINY).items()}
    folder = write_folder(tmp_path / "m", TINY)
    write_safetensors(folder / "model.safetensors", narrow)
    view = hf_view(*load_hf(folder))
    assert bits(view) == bits({name: array.astype(np.float32) for name, array in narrow.items()})
    part = SafetensorsFolder(folder).read(Q1, (slice(3, 7), slice(2, 5)))
    assert part.tobytes() == np.ascontiguousarray(narrow[Q1][3:7, 2:5]).tobytes()


def test_weights_that_are_no_floating_numbers_are_named(tmp_path):
    tensors = stored(TINY)
    tensors[Q1] = tensors[Q1].astype(np.int8)
    refused(write_folder(tmp_path / "m", TINY, tensors), Q1, "stored as I8", "use one of F64")


@pytest.mark.parametrize("other", [True, False], ids=["other head", "same head"])
def test_a_head_of_its_own_is_used_whatever_the_config_says(other, tmp_path):
    """As transformers does it: of two matrices that differ neither is dropped."""
    config = dataclasses.replace(TINY, tied=True)
    tensors = stored(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(other)
    folder = write_folder(tmp_path / "m", config, tensors)
    loaded, params = load_hf(folder)
    assert loaded.tied is not other
    assert bits(hf_view(loaded, params)) == bits(tensors if other else stored(config))
    out = save_hf(tmp_path / "out", loaded, params, like=folder)
    assert load_hf(out)[0] == loaded


def test_a_tied_matrix_may_be_stored_as_the_head_alone(tmp_path):
    config = dataclasses.replace(TINY, tied=True)
    tensors = stored(config)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    loaded, params = load_hf(write_folder(tmp_path / "m", config, tensors))
    assert loaded.tied and bits(hf_view(loaded, params)) == bits(stored(config))


def test_parts_are_read_alone(tmp_path):
    source = SafetensorsFolder(write_folder(tmp_path / "m", HALF))
    part = source.read(Q1, (slice(3, 7), slice(0, 5)))
    assert part.tobytes() == np.ascontiguousarray(stored(HALF)[Q1][3:7, :5]).tobytes()


# Saving


def test_without_a_source_the_config_is_written(tmp_path):
    config = CONFIGS["mistral"]
    umask = os.umask(0o022)
    try:
        out = save_hf(tmp_path / "deep" / "out", config, random_params(config), card="# A card\n")
    finally:
        os.umask(umask)
    assert read_config(out) == config
    assert (out / "README.md").read_text() == "# A card\n"
    assert (out.stat().st_mode & 0o777, (out / "model.safetensors").stat().st_mode & 0o777) == (0o755, 0o644)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("said", [{"torch_dtype": "bfloat16"}, {"dtype": "float32"}, {"dtype": "float16"}, {}], ids=str)
def test_an_export_says_the_dtype_of_its_weights(said, dtype, tmp_path):
    source = write_folder(tmp_path / "source", HALF)
    attributes = json.loads((source / "config.json").read_text())
    del attributes["torch_dtype"]
    (source / "config.json").write_text(json.dumps(attributes | said))
    out = save_hf(tmp_path / "out", *load_hf(source, dtype), like=source)
    written = json.loads((out / "config.json").read_text())
    name, before = next(iter(said.items()), ("torch_dtype", "float32"))
    changed = {} if before == dtype else {name: dtype}
    assert written == attributes | said | changed
    assert read_config(out).dtype == dtype == load_file(out / "model.safetensors")["model.norm.weight"].dtype


def test_companions_travel_along(tmp_path):
    source = write_folder(tmp_path / "source", HALF)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text(f"{{}} {name}\r\n")
    for name in ("pytorch_model.bin", "README.md", "modeling.py"):
        (source / name).write_text("stays")
    out = save_hf(tmp_path / "out", *load_hf(source), like=str(source))
    assert sorted(p.name for p in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def failing_at(call, monkeypatch):
    """Lets writing the file of that number fail, when half of it is there."""
    calls = []

    def save(tensors, path, **options):
        calls.append(path)
        if len(calls) == call:
            path.write_bytes(b"half")
            raise OSError("disk full")
        save_file(tensors, path, **options)

    monkeypatch.setattr(hf, "save_file", save)
    return calls


@pytest.mark.parametrize("call", [1, 2])
def test_nothing_is_left_of_a_save_that_fails(call, tmp_path, monkeypatch):
    calls = failing_at(call, monkeypatch)
    with pytest.raises(OSError, match="disk full"):
        save_hf(tmp_path / "out", HALF, random_params(HALF), shard_bytes=10_000)
    assert len(calls) == call and list(tmp_path.iterdir()) == []


def test_an_earlier_export_survives_a_save_that_fails(tmp_path, monkeypatch):
    out = save_hf(tmp_path / "out", HALF, random_params(HALF, seed=0))
    before = (out / "model.safetensors").read_bytes()
    failing_at(1, monkeypatch)
    with pytest.raises(OSError, match="disk full"):
        save_hf(out, HALF, random_params(HALF, seed=1))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    save_hf(out, HALF, random_params(HALF, seed=1), shard_bytes=10_000)
    assert not (out / "model.safetensors").exists()
    assert bits(all_tensors(out)) == bits(stored(HALF, seed=1))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    save_hf(tmp_path / "mixed", HALF, random_params(HALF))
    (tmp_path / "mixed" / "notes.txt").write_text("mine")
    for name, said in {"thesis": "holds 'chapter1.tex'", "file": "is a file", "mixed": "holds 'notes.txt'"}.items():
        with pytest.raises(FileExistsError, match=f"{name}.* {said}"):
            save_hf(tmp_path / name, HALF, random_params(HALF))
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    assert (tmp_path / "mixed" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert (save_hf(tmp_path / "empty", HALF, random_params(HALF)) / "model.safetensors").is_file()


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_parameters_that_are_no_model_are_not_saved(change, tmp_path):
    params = random_params(HALF)
    layers = dict(params["layers"])
    if change == "missing":
        del layers["down"]
    elif change == "extra":
        layers["q_norm"] = jnp.zeros((3, 16))
    else:
        layers["down"] = layers["down"][:2]
    with pytest.raises(ValueError) as error:
        save_hf(tmp_path / "out", HALF, params | {"layers": layers})
    assert ("q_norm" if change == "extra" else "down") in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# transformers reads what was written


@pytest.mark.parametrize(
    ("attributes", "options"),
    [
        ({"model_type": "llama", "tie_word_embeddings": True}, {}),
        ({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, {"shard_bytes": 10_000}),
        ({"model_type": "mistral", "sliding_window": 10}, {"like": None}),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, {"like": None}),
    ],
)
def test_transformers_gives_the_same_logits(attributes, options, tmp_path):
    torch = pytest.importorskip("torch")
    from make import torch_model
    from transformers import AutoModelForCausalLM

    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "dtype": "bfloat16"}
    torch_model(sizes | heads | attributes).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    config, params = load_hf(tmp_path / "source", mesh=parse_mesh("data:-1,model:2"))
    assert config.dtype == "bfloat16"
    save_hf(tmp_path / "out", config, params, **{"like": tmp_path / "source"} | options)
    tokens, valid = padded(TINY, [50, 9])
    logits = []
    for folder in ("source", "out"):
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, output_loading_info=True, local_files_only=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert model.dtype == torch.bfloat16
        with torch.no_grad():
            ids, mask = torch.from_numpy(tokens).long(), torch.from_numpy(valid).long()
            logits.append(model(input_ids=ids, attention_mask=mask).logits)
    assert torch.equal(*logits)


def test_logits_survive_the_round_trip(tmp_path):
    source = write_folder(tmp_path / "source", HALF)
    config, params = load_hf(source)
    _, again = load_hf(save_hf(tmp_path / "out", config, params, like=source))
    rows = padded(config, [48, 5])
    np.testing.assert_array_equal(logits_of(config, params, *rows), logits_of(config, again, *rows))
