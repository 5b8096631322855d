"""Steering vectors through files: safetensors both ways, GGUF read back with the gguf package."""

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import tiny_config

from jaxsafe.io.vectors import (
    FIELDS,
    load_control_vector,
    load_steering,
    load_vectors,
    save_control_vector,
    save_steering,
)
from jaxsafe.kernels.steering import PromptStates, Steering

MADE_FOR = {"configuration": "0123", "sketch": {"layers/q": [2.0, 1.0, -1.0], "norm": [1.0, 0.5, 0.5]}}


@pytest.fixture
def steering():
    rng = np.random.default_rng(0)
    return Steering(
        # A transposed array: what lies behind it in memory is in another order.
        directions=jnp.asarray(rng.standard_normal((6, 4))).T,
        reference=jnp.asarray(rng.standard_normal((4, 6))),
        scored=jnp.array([0.0, 1, 1, 0]),
        threshold=jnp.float32(0.375),
        strength=jnp.array([0.0, 2.5, 0, 0.5]),
        affirmative=jnp.array([57, 91, 269]),
    )


def test_what_was_saved_is_loaded(tmp_path, steering):
    path, metadata = tmp_path / "new" / "v.safetensors", {"origin": MADE_FOR, "choice": {"layers": [1, 4]}}
    save_steering(path, steering, metadata)
    for digest in (None, MADE_FOR):
        found, meta = load_steering(path, digest)
        assert meta == metadata
        assert tuple(f.name for f in dataclasses.fields(Steering)) == tuple(FIELDS)
        for name in FIELDS:
            ours, given = np.asarray(getattr(found, name)), np.asarray(getattr(steering, name))
            assert ours.shape == given.shape and ours.dtype == FIELDS[name], name
            np.testing.assert_array_equal(ours, given, err_msg=name)
    assert jax.tree.structure(found) == jax.tree.structure(steering)


def test_a_file_without_the_affirmative_loads_where_its_ids_are_known(tmp_path, steering):
    save_steering(tmp_path / "new", steering, {"origin": MADE_FOR})
    arrays = {name: np.asarray(getattr(steering, name)) for name in FIELDS if name != "affirmative"}
    arrays["directions"] = np.ascontiguousarray(arrays["directions"])
    save_file(arrays, tmp_path / "old", metadata={"jaxsafe": json.dumps({"origin": MADE_FOR})})
    with pytest.raises(ValueError, match=r"lacks \['affirmative'\]"):
        load_steering(tmp_path / "old")
    found, _ = load_steering(tmp_path / "old", MADE_FOR, affirmative=[5, 6])
    assert found.affirmative.dtype == np.int32 and found.affirmative.tolist() == [5, 6]
    # A file's own ids are taken.
    assert load_steering(tmp_path / "new", affirmative=[5, 6])[0].affirmative.tolist() == [57, 91, 269]


def test_numpy_and_other_layouts_of_memory_are_saved_as_they_read(tmp_path, steering):
    turned = steering.replace(directions=np.asfortranarray(np.asarray(steering.directions, np.float64)))
    save_steering(tmp_path / "v", turned, {})
    np.testing.assert_array_equal(load_steering(tmp_path / "v")[0].directions, steering.directions)


def test_vectors_of_another_model_are_refused(tmp_path, steering):
    save_steering(tmp_path / "v", steering, {"model": "mine", "origin": MADE_FOR})
    rounded = {"layers/q": [2.0, 1.008, -1.008], "norm": [1.0, 0.5, 0.5]}
    load_steering(tmp_path / "v", MADE_FOR | {"sketch": rounded})
    other = {"layers/q": [2.0, 1.02, -1.02], "norm": [1.0, 0.5, 0.5]}
    with pytest.raises(ValueError, match=r"made for 'mine', .* other weights \(they are 0.00707 apart; rounding makes"):
        load_steering(tmp_path / "v", MADE_FOR | {"sketch": other})
    with pytest.raises(ValueError, match="made for 'mine', a model of another configuration"):
        load_steering(tmp_path / "v", MADE_FOR | {"configuration": "4567"})
    save_steering(tmp_path / "unsigned", steering, {"model": "mine"})
    with pytest.raises(ValueError, match="does not say which weights it was made for"):
        load_steering(tmp_path / "unsigned", MADE_FOR)


def test_a_file_cut_short_is_refused(tmp_path, steering):
    path = tmp_path / "v"
    save_steering(path, steering, {})
    content = path.read_bytes()
    for n in (0, 5, 40, len(content) - 1):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            load_steering(path)


def test_other_files_are_refused_by_name(tmp_path, steering):
    with pytest.raises(FileNotFoundError, match="no steering vectors at"):
        load_steering(tmp_path / "absent")
    arrays = {name: np.asarray(getattr(steering, name)) for name in FIELDS}
    save_file(arrays, tmp_path / "anonymous")
    with pytest.raises(ValueError, match="lacks metadata"):
        load_steering(tmp_path / "anonymous")
    del arrays["strength"], arrays["scored"]
    save_file(arrays, tmp_path / "part", metadata={"jaxsafe": "{}"})
    with pytest.raises(ValueError, match=r"lacks \['scored', 'strength'\]"):
        load_steering(tmp_path / "part")


def test_a_failed_save_leaves_what_was_there(tmp_path, steering):
    save_steering(tmp_path / "v", steering, {"kept": True})
    with pytest.raises(TypeError):
        save_steering(tmp_path / "v", steering, {"no JSON": object()})
    assert load_steering(tmp_path / "v")[1] == {"kept": True}
    assert [p.name for p in tmp_path.iterdir()] == ["v"]


def test_a_control_vector_holds_strength_times_direction_of_each_block(tmp_path, steering):
    path = tmp_path / "v.gguf"
    save_control_vector(path, steering, "llama")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 3,
    }
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.2", "direction.3"]
    for tensor in reader.tensors:
        layer = int(tensor.name.split(".")[1])
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.shape.tolist() == [6]
        wanted = float(steering.strength[layer]) * np.asarray(steering.directions[layer])
        np.testing.assert_allclose(tensor.data, wanted, rtol=1e-6)
    wanted = np.asarray(steering.strength)[:, None] * np.asarray(steering.directions)
    np.testing.assert_array_equal(load_control_vector(path, 4, 6), wanted)


def test_a_control_vector_cannot_steer_block_zero(tmp_path, steering):
    with pytest.raises(ValueError, match="cannot steer block 0"):
        save_control_vector(tmp_path / "v.gguf", steering.replace(strength=jnp.ones(4)), "llama")
    assert not list(tmp_path.iterdir())


def test_control_vectors_of_another_shape_and_other_files_are_refused(tmp_path, steering):
    path = tmp_path / "v.gguf"
    save_control_vector(path, steering, "llama")
    with pytest.raises(ValueError, match=r"direction.3 of \(6,\) does not fit 3 blocks of 6"):
        load_control_vector(path, 3, 6)
    with pytest.raises(ValueError, match=r"direction.1 of \(6,\) does not fit 4 blocks of 8"):
        load_control_vector(path, 4, 8)
    with pytest.raises(FileNotFoundError, match="no control vector at"):
        load_control_vector(tmp_path / "absent", 4, 6)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(ValueError, match="is not a GGUF control vector"):
        load_control_vector(tmp_path / "model.gguf", 4, 6)
    (tmp_path / "text").write_text("no vector at all, only words, forty bytes of them")
    with pytest.raises(ValueError, match="text is not a whole GGUF file"):
        load_control_vector(tmp_path / "text", 4, 6)


def test_a_control_vector_cut_short_is_refused(tmp_path, steering):
    path = tmp_path / "v.gguf"
    save_control_vector(path, steering, "llama")
    content = path.read_bytes()
    for n in range(0, len(content) - gguf.GGUF_DEFAULT_ALIGNMENT, 5):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match="is not a whole GGUF file"):
            load_control_vector(path, 4, 6)


# --- vectors of any source


SHAPE = tiny_config(layers=4, embed=6)


def control_vector(path, directions, arch="controlvector"):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("controlvector.model_hint", "llama")
    for name, direction in directions.items():
        writer.add_tensor(name, np.ascontiguousarray(direction))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


@pytest.mark.parametrize(("layers", "dtype"), [((1, 2, 3), np.float32), ((2,), np.float32), ((1, 3), np.float16)])
def test_a_control_vector_is_added_to_every_prompt(tmp_path, layers, dtype):
    added = {n: np.random.default_rng(n).standard_normal(6).astype(dtype) for n in layers}
    path = control_vector(tmp_path / "v", {f"direction.{n}": direction for n, direction in added.items()})
    rule, metadata = load_vectors(path, SHAPE)
    assert metadata == {}
    rng = np.random.default_rng(9)
    states = PromptStates(jnp.zeros((4, 3, 6)), jnp.asarray(rng.standard_normal((4, 3, 6)), jnp.float32))
    assert rule.gate(states).tolist() == [1.0] * 3
    total = np.asarray(rule.edits(rule.gate(states), jnp.zeros(3, int))["resid"].add)
    for n in range(4):
        np.testing.assert_allclose(total[n], added.get(n, np.zeros(6)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("directions", "said"),
    [
        ({"direction.mean": np.ones(6, np.float32)}, r"direction.mean \(F32\) is no direction.N"),
        ({"direction.-1": np.ones(6, np.float32)}, r"direction.-1 \(F32\) is no direction.N"),
        ({"direction.1": np.ones(6, np.int32)}, r"direction.1 \(I32\) is no direction.N"),
        ({"direction.0": np.ones(6, np.float32)}, "does not fit 4 blocks of 6"),
        ({"direction.7": np.ones(6, np.float32)}, "does not fit 4 blocks of 6"),
        ({"direction.1": np.full(6, np.inf, np.float32)}, "numbers that are not finite"),
        ({"direction.1": np.zeros(6, np.float32)}, "holds no direction"),
    ],
)
def test_control_vectors_that_steer_nothing_are_refused(tmp_path, directions, said):
    with pytest.raises(ValueError, match=said):
        load_vectors(control_vector(tmp_path / "v", directions), SHAPE)


def test_a_steering_file_is_one_of_the_vectors(tmp_path, steering):
    save_steering(tmp_path / "v", steering, {"origin": MADE_FOR})
    found, metadata = load_vectors(tmp_path / "v", SHAPE, MADE_FOR)
    np.testing.assert_array_equal(found.directions, steering.directions)
    assert metadata == {"origin": MADE_FOR}
    with pytest.raises(ValueError, match="is of 4 blocks of 6; the model has 3 of 6"):
        load_vectors(tmp_path / "v", tiny_config(layers=3, embed=6))
    with pytest.raises(FileNotFoundError, match="no steering vectors at"):
        load_vectors(tmp_path / "absent", SHAPE)


@pytest.mark.parametrize("name", ["directions", "reference", "threshold", "strength"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, steering, name):
    save_steering(tmp_path / "v", steering.replace(**{name: jnp.full_like(getattr(steering, name), jnp.nan)}), {})
    with pytest.raises(ValueError, match=f"{name} holds numbers that are not finite"):
        load_steering(tmp_path / "v")


def test_arrays_of_other_shapes_are_refused(tmp_path, steering):
    for name, shape in (("reference", (4, 5)), ("scored", (3,)), ("threshold", (1,)), ("directions", (6,))):
        save_steering(tmp_path / "v", steering.replace(**{name: np.ones(shape)}), {})
        with pytest.raises(ValueError, match="which is no part of a steering"):
            load_steering(tmp_path / "v")
