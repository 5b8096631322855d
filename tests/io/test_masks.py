"""Masks and scores through files: what others read of them, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import tiny_config

from jaxsafe.io.masks import ABOUT_SCORES, load_mask, load_scores, save_mask, save_scores
from jaxsafe.model.weights import flatten, hf_view, linear_maps, shapes, shardings
from jaxsafe.parallel import parse_mesh

# Matrices whose entries do not fill whole bytes.
CONFIG = tiny_config(layers=2, embed=5, mlp=7, heads=3, kv_heads=1, head_dim=2)
ABOUT = {"kind": "snip", "model": "0123456789abcdef", "data": "ab12", "n": 4, "loss": "mean", "positions": "response"}


def random_scores(config=CONFIG, seed=0):
    rng = np.random.default_rng(seed)
    names = [path.split("/")[1] for path in linear_maps(config)]
    whole = {name: shapes(config)["layers"][name].shape for name in names}
    return {"layers": {name: rng.standard_normal(shape).astype(np.float32) for name, shape in whole.items()}}


def random_mask(config=CONFIG, seed=0):
    return jax.tree.map(lambda a: a > 0, random_scores(config, seed))


def assert_same(found, given):
    assert flatten(found).keys() == flatten(given).keys()
    for path, leaf in flatten(given).items():
        assert flatten(found)[path].dtype == leaf.dtype
        np.testing.assert_array_equal(flatten(found)[path], leaf, err_msg=path)


@given(seed=st.integers(0, 10**6), mlp=st.integers(1, 9), embed=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_what_was_saved_is_loaded(tmp_path_factory, seed, mlp, embed):
    config = tiny_config(layers=2, embed=embed, mlp=mlp, heads=2, kv_heads=1, head_dim=2)
    path = tmp_path_factory.mktemp("new") / "folder" / "mask.safetensors"
    mask, scores = random_mask(config, seed), random_scores(config, seed)
    save_mask(path, config, mask, {"q": 0.05, "note": "ü"})
    found, metadata = load_mask(path, config)
    assert metadata == {"q": 0.05, "note": "ü"}
    assert_same(found, mask)
    save_scores(path, config, jax.tree.map(jnp.asarray, scores), ABOUT)
    found, metadata = load_scores(path, config, ABOUT["model"])
    assert metadata == ABOUT
    assert_same(found, scores)


def test_others_read_the_files(tmp_path):
    mask, scores = random_mask(), random_scores()
    save_mask(tmp_path / "m", CONFIG, mask, {})
    save_scores(tmp_path / "s", CONFIG, scores, ABOUT)
    stored, values = load_file(tmp_path / "m"), load_file(tmp_path / "s")
    with safe_open(tmp_path / "m", framework="numpy") as file:
        about = json.loads(file.metadata()["jaxsafe"])
    bits, whole = hf_view(CONFIG, mask), hf_view(CONFIG, scores)
    assert stored.keys() == values.keys() == bits.keys() and len(stored) == 14
    for name, packed in stored.items():
        out, into = about["shapes"][name]
        assert packed.dtype == np.uint8 and packed.size == (out * into + 7) // 8
        np.testing.assert_array_equal(np.unpackbits(packed)[: out * into].reshape(out, into), bits[name])
        np.testing.assert_array_equal(values[name], whole[name])
    # Written out by hand: row n * H + h of q_proj is head n, feature h.
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(values[name][2 * 2 + 1], scores["layers"]["q"][1, :, 2, 1])


def test_some_of_the_maps(tmp_path):
    mask = {"layers": {name: random_mask()["layers"][name] for name in ("up", "o")}}
    save_mask(tmp_path / "m", CONFIG, mask, {})
    assert_same(load_mask(tmp_path / "m", CONFIG)[0], mask)


def test_files_are_laid_out_on_a_mesh(tmp_path):
    config, mesh = tiny_config(), parse_mesh("data:-1,model:2")
    mask, scores = random_mask(config), random_scores(config)
    save_mask(tmp_path / "m", config, jax.device_put(mask, {"layers": layout(config, mesh)}), {})
    save_scores(tmp_path / "s", config, scores, ABOUT)
    for found, given_ in (
        (load_mask(tmp_path / "m", config, mesh)[0], mask),
        (load_scores(tmp_path / "s", config, mesh=mesh)[0], scores),
    ):
        assert_same(found, given_)
        assert {name: leaf.sharding for name, leaf in found["layers"].items()} == layout(config, mesh)


def layout(config, mesh):
    return {path.split("/")[1]: flatten(shardings(config, mesh))[path] for path in linear_maps(config)}


def test_files_of_another_model_are_refused(tmp_path):
    save_mask(tmp_path / "m", CONFIG, random_mask(), {})
    save_scores(tmp_path / "s", CONFIG, random_scores(), ABOUT)
    others = {
        r"0.self_attn.q_proj.weight is \(6, 5\); the config asks \(6, 4\)": {"embed": 4},
        r"k_proj.weight is \(2, 5\); the config asks \(6, 5\)": {"kv_heads": 3},
        "no linear map 'model.layers.1": {"layers": 1},
        "it lacks 'model.layers.2": {"layers": 3},
    }
    for words, changes in others.items():
        config = tiny_config(
            **({"layers": 2, "embed": 5, "mlp": 7, "heads": 3, "kv_heads": 1, "head_dim": 2} | changes)
        )
        for load, path in ((load_mask, tmp_path / "m"), (load_scores, tmp_path / "s")):
            with pytest.raises(ValueError, match=f"was made for another model: .*{words}"):
                load(path, config)
    words = "was made for the model 0123456789ab, not for this one, fedcba987654"
    with pytest.raises(ValueError, match=words):
        load_scores(tmp_path / "s", CONFIG, "fedcba9876543210")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "f"
    with pytest.raises(FileNotFoundError, match="no mask at"):
        load_mask(path, CONFIG)
    save_scores(path, CONFIG, random_scores(), ABOUT)
    with pytest.raises(ValueError, match="f holds scores, not mask"):
        load_mask(path, CONFIG)
    save_mask(path, CONFIG, random_mask(), {})
    with pytest.raises(ValueError, match="f holds mask, not scores"):
        load_scores(path, CONFIG)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="f holds nothing of this library, not mask"):
        load_mask(path, CONFIG)


@pytest.mark.parametrize("kind", ["mask", "scores"])
def test_files_that_were_tampered_with_are_refused(tmp_path, kind):
    path, load = tmp_path / "f", {"mask": load_mask, "scores": load_scores}[kind]
    if kind == "mask":
        save_mask(path, CONFIG, random_mask(), {})
    else:
        save_scores(path, CONFIG, random_scores(), ABOUT)
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
    name = "model.layers.0.mlp.up_proj.weight"
    for changed in (tensors[name].ravel()[:-1], tensors[name].astype(np.int16)):
        save_file(tensors | {name: changed}, path, metadata=about)
        with pytest.raises(ValueError, match=f"{name} is .*, not "):
            load(path, CONFIG)
    save_file({k: v for k, v in tensors.items() if k != name}, path, metadata=about)
    with pytest.raises(ValueError, match=f"its tensors are not those that its metadata names, first '{name}'"):
        load(path, CONFIG)
    text = json.loads(about["jaxsafe"])
    text["shapes"]["lm_head.weight"] = [3, 3]
    save_file(tensors | {"lm_head.weight": np.zeros((3, 3), np.float32)}, path, metadata={"jaxsafe": json.dumps(text)})
    with pytest.raises(ValueError, match=r"this one has no linear map 'lm_head\.weight'"):
        load(path, CONFIG)
    for broken in ("{", "[]", '"text"', f'{{"kind": "{kind}"}}'):
        save_file(tensors, path, metadata={"jaxsafe": broken})
        with pytest.raises(ValueError, match="f holds "):
            load(path, CONFIG)


def test_a_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "m"
    save_mask(path, CONFIG, random_mask(), {})
    content = path.read_bytes()
    for n in [*range(0, len(content) - 1, 97), len(content) - 1]:
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            load_mask(path, CONFIG)


def test_trees_that_do_not_fit_are_not_written(tmp_path):
    path = tmp_path / "m"
    for tree, words in (
        ({"layers": {"attn_norm": np.ones((2, 5), bool)}}, "'layers/attn_norm' .* no such linear map"),
        ({"embed": np.ones((300, 5), bool)}, "'embed' .* no such linear map"),
        ({"layers": {"up": np.ones((3, 5, 7), bool)}}, r"'layers/up' has shape \(3, 5, 7\); .* \(2, 5, 7\)"),
        ({}, "holds no map"),
    ):
        with pytest.raises(ValueError, match=words):
            save_mask(path, CONFIG, tree, {})
    with pytest.raises(ValueError, match=r"lacks \['model', 'loss'\]"):
        save_scores(path, CONFIG, random_scores(), {k: v for k, v in ABOUT.items() if k not in ("model", "loss")})
    assert set(ABOUT_SCORES) == ABOUT.keys()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "m"
    save_mask(path, CONFIG, random_mask(), {})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_mask(path, CONFIG, random_mask(), {"not": {"json"}})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
