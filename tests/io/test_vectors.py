"""Steering vectors through files: safetensors both ways, GGUF read back with the gguf package."""

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxsafe.io.vectors import FIELDS, load_control_vector, load_steering, save_control_vector, save_steering
from jaxsafe.kernels.steering import Steering

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
