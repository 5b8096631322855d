"""Logits that transformers gave once (`golden/make.py`), so that parity is checked without torch as well."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from jaxsafe.io.hub import load_hf
from jaxsafe.model.families import FAMILIES
from jaxsafe.model.transformer import forward

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
jitted = jax.jit(forward, static_argnums=0)


@functools.cache
def golden(name):
    config, params = load_hf(GOLDEN / name, dtype="float32")
    with np.load(GOLDEN / f"{name}.npz") as file:
        return config, params, file["tokens"], file["valid"], file["logits"]


def off(name, **changes):
    """The largest difference from the golden logits of the model whose configuration is changed so."""
    config, params, tokens, valid, logits = golden(name)
    rope = dataclasses.replace(config.rope, **changes.pop("rope", {}))
    config = dataclasses.replace(config, rope=rope, **changes)
    return np.abs(np.asarray(jitted(config, params, tokens, valid))[valid] - logits).max()


@pytest.mark.parametrize("name", sorted(file.stem for file in GOLDEN.glob("*.npz")))
def test_logits(name):
    assert off(name) < 1e-5


def test_every_family_has_a_file():
    assert {golden(file.stem)[0].family for file in GOLDEN.glob("*.npz")} == FAMILIES.keys()


def test_what_the_files_hold():
    config, _, _, valid, _ = golden("llama")
    assert config.tied and config.rope.kind == "llama3" and config.heads == 2 * config.kv_heads
    assert json.loads((GOLDEN / "llama" / "config.json").read_text())["dtype"] == "bfloat16"
    assert config.heads * config.head_dim != config.embed
    assert valid.sum(1).max() >= 48 and not valid.all()
    config, _, _, valid, _ = golden("mistral")
    assert not config.tied and config.window < 48 <= valid.sum(1).max() and not valid.all()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rope": {"kind": "default"}}),
        ("llama", {"rope": {"theta": 20_000.0}}),
        ("llama", {"rope": {"original_context": 48}}),
        ("llama", {"norm_eps": 1e-6}),
        ("mistral", {"rope": {"theta": 1000.0}}),
        ("mistral", {"norm_eps": 1e-6}),
        ("mistral", {"window": None}),
        ("mistral", {"window": 12}),
        ("mistral", {"window": 10}),
    ],
)
def test_a_model_read_wrongly_would_be_seen(name, changes):
    assert off(name, **changes) > 1e-4


def test_made_again(tmp_path):
    pytest.importorskip("torch")
    from make import make

    make(tmp_path)
    for name in ("llama", "mistral"):
        config, params = load_hf(tmp_path / name, dtype="float32")
        assert config == golden(name)[0]
        jax.tree.map(np.testing.assert_array_equal, params, golden(name)[1])
        with np.load(tmp_path / f"{name}.npz") as file:
            np.testing.assert_array_equal(file["tokens"], golden(name)[2])
            np.testing.assert_array_equal(file["valid"], golden(name)[3])
            np.testing.assert_allclose(file["logits"], golden(name)[4], atol=1e-5, rtol=0)
