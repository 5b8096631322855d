"""Meshes: what their lines mean, where rows and weights lie, who reads what, and that no number depends on them."""

import dataclasses
import functools
import pathlib
import sys

import jax
import numpy as np
import pytest
from decoders import SCALED, TINY, InMemory, hf_weights, logits_of, padded, random_params
from folders import write_folder
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec
from launches import finished, free_port, started
from two_processes import LENGTHS

from jaxsafe.io.hub import load_hf
from jaxsafe.io.tensors import load_params
from jaxsafe.kernels.forward import capture
from jaxsafe.model.taps import At, SquareSum, edit
from jaxsafe.model.weights import RULES, flatten, hf_shapes, partition_spec, shardings, weights
from jaxsafe.parallel import banner, parse_mesh, put_rows

MESH = "data:-1,model:2"
CONFIGS = {
    "all divide": dataclasses.replace(SCALED, vocab=104, qkv_bias=True, o_bias=True, mlp_bias=True),
    "odd vocabulary, one kv head": dataclasses.replace(TINY, kv_heads=1, window=9, tied=True),
    "odd heads": dataclasses.replace(TINY, heads=3, kv_heads=3, embed=30, mlp=50),
}
captured = jax.jit(capture, static_argnames=("config", "taps"))


# The mesh


@pytest.mark.parametrize(
    ("text", "data", "model"),
    [
        ("data:-1", 8, 1),
        ("data:-1,model:2", 4, 2),
        ("model:2,data:-1", 4, 2),
        ("data:1,model:-1", 1, 8),
        (" data : 2 , model : 4 ", 2, 4),
        ("model:8", 1, 8),
    ],
)
def test_a_line_is_a_mesh(text, data, model):
    mesh = parse_mesh(text)
    assert dict(mesh.shape) == {"data": data, "model": model}
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_of_some_devices():
    mesh = parse_mesh("data:-1,model:2", jax.devices()[2:6])
    assert dict(mesh.shape) == {"data": 2, "model": 2}
    assert set(mesh.devices.flat) == set(jax.devices()[2:6])
    assert dict(parse_mesh("", jax.devices()[:1]).shape) == {"data": 1, "model": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("date:-1", ["'date'", "data, model"]),
        ("data:4,seq:2", ["'seq'"]),
        ("data:four", ["'data'", "'four'", "positive length or -1"]),
        ("data", ["'data'", "''"]),
        ("data:0", ["'data'", "'0'"]),
        ("data:-2", ["'data'", "'-2'"]),
        ("data:--1", ["'data'", "'--1'"]),
        ("data:²", ["'data'", "'²'"]),
        ("data:1.5", ["'1.5'"]),
        ("data:-1,model:-1", ["two axes of length -1"]),
        ("data:2,data:4", ["'data'", "stands twice"]),
        ("data:2,model:2", ["2 x 2", "8 devices"]),
        ("data:16", ["16 x 1", "8 devices"]),
        ("data:-1,model:3", ["2 x 3", "8 devices"]),
        ("data:-1,model:16", ["1 x 16", "8 devices"]),
        ("", ["1 x 1", "8 devices"]),
    ],
)
def test_a_line_that_is_no_mesh_is_refused(text, words):
    with pytest.raises(ValueError) as error:
        parse_mesh(text)
    assert all(word in str(error.value) for word in [*words, repr(text)]), error.value
    assert "\n" not in str(error.value)


@given(data=st.integers(1, 8), model=st.integers(1, 8))
def test_exactly_the_meshes_that_fill_the_devices_are_made(data, model):
    text = f"data:{data},model:{model}"
    if data * model == 8:
        assert dict(parse_mesh(text).shape) == {"data": data, "model": model}
        assert parse_mesh(f"data:-1,model:{model}") == parse_mesh(text) == parse_mesh(f"data:{data},model:-1")
    else:
        with pytest.raises(ValueError, match=f"{data} x {model}"):
            parse_mesh(text)


def test_banner_is_one_line():
    assert banner().startswith("process 0 of 1, 8 x ") and "\n" not in banner()


# Rows


def test_rows_are_split_over_data():
    tokens, valid = padded(TINY, [8, 3, 5, 0, 2, 1, 8, 7])
    placed = put_rows({"tokens": tokens, "valid": valid}, parse_mesh(MESH))
    for name, array in (("tokens", tokens), ("valid", valid)):
        np.testing.assert_array_equal(placed[name], array)
        assert {shard.data.shape for shard in placed[name].addressable_shards} == {(2, 8)}
        assert placed[name].sharding.spec == PartitionSpec("data")
    plain = put_rows({"tokens": tokens}, None)["tokens"]
    assert isinstance(plain, jax.Array) and len(plain.devices()) == 1


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_rows_that_do_not_divide_are_refused(rows):
    with pytest.raises(ValueError, match=f"batch of {rows} rows does not divide over 4 devices of the data axis"):
        put_rows(padded(TINY, [4] * rows), parse_mesh(MESH))


# Weights


def expected_parts(config, name, data, model):
    """Into how many parts each axis of a weight's Hugging Face matrix falls, written out by hand."""
    split = {"embed": data, "wide": model}
    tables = {
        "embed_tokens.weight": ("wide", "embed"),
        "lm_head.weight": ("wide", "embed"),
        "norm.weight": ("embed",),
        **{f"{x}_proj.weight": ("wide", "embed") for x in ("q", "k", "v", "gate", "up")},
        **{f"{x}_proj.bias": ("wide",) for x in ("q", "k", "v", "gate", "up")},
        **{f"{x}_proj.weight": ("embed", "wide") for x in ("o", "down")},
        **{f"{x}_proj.bias": ("embed",) for x in ("o", "down")},
    }
    axes = next(axes for ending, axes in tables.items() if name.endswith(ending))
    sizes = {"embed_tokens": config.vocab, "lm_head": config.vocab, "q_proj": config.heads, "o_proj": config.heads}
    sizes |= {"k_proj": config.kv_heads, "v_proj": config.kv_heads}
    wide = next((size for part, size in sizes.items() if part in name), config.mlp)
    whole = {"embed": config.embed % data == 0, "wide": wide % model == 0}
    return tuple(split[axis] if whole[axis] else 1 for axis in axes)


@pytest.mark.parametrize("mesh", [MESH, "data:2,model:4", "data:8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loaded_weights_are_sharded_and_read_once(name, mesh):
    config, mesh = CONFIGS[name], parse_mesh(mesh)
    tensors = hf_weights(config)
    source = InMemory(tensors)
    params = flatten(load_params(config, source, mesh))
    whole = flatten(random_params(config))
    for path, weight in weights(config).items():
        np.testing.assert_array_equal(params[path], whole[path])
        parts = expected_parts(config, weight.hf, mesh.shape["data"], mesh.shape["model"])
        sizes = {shard.data.size for shard in params[path].addressable_shards}
        assert sizes == {whole[path].size // np.prod(parts)}, path
    read = {}
    for tensor, shape in source.reads:
        read.setdefault(tensor, []).append(shape)
    assert read.keys() == tensors.keys()
    for tensor, shapes in read.items():
        parts = expected_parts(config, tensor, mesh.shape["data"], mesh.shape["model"])
        shape = tuple(n // p for n, p in zip(hf_shapes(config)[tensor], parts, strict=True))
        assert shapes == [shape] * int(np.prod(parts)), tensor


def test_what_does_not_divide_is_replicated():
    config, mesh = CONFIGS["odd heads"], parse_mesh(MESH)
    table = weights(config)
    specs = {path: tuple(partition_spec(config, table[path], mesh)) for path in table}
    assert specs["layers/q"] == (None, None, None, None)
    assert specs["layers/gate"] == (None, None, "model")
    assert specs["layers/down"] == (None, "model", None)
    assert specs["embed"] == (None, None)
    whole = CONFIGS["all divide"]
    specs = {path: tuple(partition_spec(whole, w, mesh)) for path, w in weights(whole).items()}
    assert specs["layers/q"] == (None, "data", "model", None)
    assert specs["layers/o"] == (None, "model", None, "data")
    assert specs["unembed"] == ("data", "model")
    assert set(RULES.values()) == set(mesh.axis_names)
    assert flatten(shardings(whole, mesh))["layers/k"].spec == PartitionSpec(None, "data", "model", None)


# One device or eight


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mesh_changes_no_number(name):
    config, mesh = CONFIGS[name], parse_mesh(MESH)
    tensors = hf_weights(config)
    tokens, valid = padded(config, [48, 5, 0, 17])
    add = np.random.default_rng(0).standard_normal((config.layers, config.embed)).astype(np.float32)
    edits = {"resid": edit(add=add, start=3)}
    taps = ("resid", "mlp_hidden", "heads", "final")
    reduce = {"mlp_hidden": SquareSum(valid.astype(np.float32)), "resid": At(np.full((4, 1), 47, np.int32))}

    def both(params, tokens, valid):
        read = captured(config, params, tokens, valid, taps=taps, edits=edits, reduce=reduce)
        return logits_of(config, params, tokens, valid, edits), read

    alone = both(load_params(config, InMemory(tensors)), tokens, valid)
    spread = both(load_params(config, InMemory(tensors), mesh), *put_rows((tokens, valid), mesh))
    assert len(spread[0].devices()) == 8 and len(alone[0].devices()) == 1
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), alone, spread)


def test_two_processes(tmp_path):
    """Two processes of four devices each load half the bytes and give the logits of one."""
    config = CONFIGS["all divide"]
    folder = write_folder(tmp_path / "model", config, hf_weights(config))
    command, port = [sys.executable, str(pathlib.Path(__file__).parent / "support/two_processes.py")], free_port()
    finished(*(started([*command, str(i), str(port), str(folder), str(tmp_path / f"{i}.npz")]) for i in range(2)))
    config, params = load_hf(folder)
    tokens, valid = padded(config, LENGTHS)
    logits = logits_of(config, params, tokens, valid)
    resid = captured(config, params, tokens, valid)["resid"]
    total = {name: int(np.prod(shape)) * 4 for name, shape in hf_shapes(config).items()}
    for i in range(2):
        with np.load(tmp_path / f"{i}.npz") as out:
            assert str(out["banner"]).startswith(f"process {i} of 2, 8 x ")
            np.testing.assert_allclose(out["logits"], logits, atol=1e-5, rtol=0)
            np.testing.assert_allclose(out["resid"], resid, atol=1e-5, rtol=1e-5)
            read = dict(zip(out["names"].tolist(), out["bytes"].tolist(), strict=True))
        assert read.keys() == total.keys()
        for name, size in total.items():
            # Half of `embed` belongs to a process; what has no such axis is held, and read, by both.
            half = not name.endswith(tuple(f"{x}_proj.bias" for x in ("q", "k", "v", "gate", "up")))
            assert read[name] == (size // 2 if half else size), name
