"""Masks and scores of the linear maps in safetensors files, under Hugging Face's names as matrices [out, in]."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxsafe.io.atomic import new_file
from jaxsafe.kernels.selection import Mask, Scores
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.weights import (
    flatten,
    from_matrix,
    hf_shapes,
    hf_tensors,
    layer_shape,
    linear_maps,
    nest,
    partition_spec,
)
from jaxsafe.parallel import fetch
from jaxsafe.reading import reading

ABOUT_SCORES = ("kind", "model", "data", "n", "loss", "positions")
"""What metadata of scores must say: their kind, the model's fingerprint, the data, samples, loss and positions."""

Matrices = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


def save_mask(
    path: str | os.PathLike, config: ModelConfig, mask: Mask, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes the boolean tree `mask` with eight entries a byte (numpy.packbits of each matrix); `metadata` is JSON.

    One matrix at a time is whole on the host. Raises ValueError for a tree that does not fit `config`.
    """
    shapes, packed = {}, {}
    for name, matrix in _matrices(config, mask):
        shapes[name], packed[name] = matrix.shape, np.packbits(matrix.astype(bool))
    _save(path, "mask", packed, shapes, dict(metadata or {}))


def load_mask(
    path: str | os.PathLike, config: ModelConfig, mesh: Mesh | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The mask of `path` (boolean tree, laid out on `mesh` where there is one) and its metadata.

    Raises FileNotFoundError, and ValueError for a file that is cut short, of another kind or of another model.
    """
    with _open(path, "mask") as (read, shapes, metadata):

        def matrix(name: str) -> np.ndarray:
            packed, size = read(name), int(np.prod(shapes[name]))
            if packed.dtype != np.uint8 or packed.shape != (-(-size // 8),):
                raise ValueError(f"{path}: {name} is {packed.dtype} {list(packed.shape)}, not {size} packed bits")
            return np.unpackbits(packed, count=size).reshape(shapes[name]).astype(bool)

        return _tree(path, config, shapes, matrix, np.dtype(bool), mesh), metadata


def save_scores(path: str | os.PathLike, config: ModelConfig, scores: Scores, metadata: dict[str, Any]) -> None:
    """Writes the tree `scores` as float32; `metadata` (JSON) must hold all that ABOUT_SCORES names.

    Raises ValueError for missing metadata and for a tree that does not fit `config`.
    """
    if missing := [key for key in ABOUT_SCORES if key not in metadata]:
        raise ValueError(f"the metadata of scores lacks {missing}; it must hold {list(ABOUT_SCORES)}")
    matrices = {name: matrix.astype(np.float32) for name, matrix in _matrices(config, scores)}
    _save(path, "scores", matrices, {name: matrix.shape for name, matrix in matrices.items()}, metadata)


def load_scores(
    path: str | os.PathLike, config: ModelConfig, model_fingerprint: str | None = None, mesh: Mesh | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scores of `path` (float32 tree, laid out on `mesh` where there is one) and their metadata.

    Raises FileNotFoundError, and ValueError for a file that is cut short, of another kind or of another model;
    `model_fingerprint` is checked against the one that the scores were made with.
    """
    with _open(path, "scores") as (read, shapes, metadata):
        made_for = str(metadata.get("model"))
        if model_fingerprint is not None and made_for != model_fingerprint:
            raise ValueError(
                f"{path} was made for the model {made_for[:12]}, not for this one, {model_fingerprint[:12]}"
            )

        def matrix(name: str) -> np.ndarray:
            values = read(name)
            if values.dtype != np.float32 or values.shape != shapes[name]:
                raise ValueError(f"{path}: {name} is {values.dtype} {list(values.shape)}, not float32 {shapes[name]}")
            return values

        return _tree(path, config, shapes, matrix, np.dtype(np.float32), mesh), metadata


def _matrices(config: ModelConfig, tree: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    table = linear_maps(config)
    if not flatten(tree):
        raise ValueError(f"the tree holds no map; it needs one or more of {list(table)}")
    for path, leaf in flatten(tree).items():
        expected = (config.layers, *layer_shape(config, table[path])) if path in table else "no such linear map"
        if tuple(leaf.shape) != expected:
            raise ValueError(f"{path!r} has shape {tuple(leaf.shape)}; the config asks {expected}")
    for name, matrix in hf_tensors(config, tree):
        yield name, np.asarray(fetch(matrix))


def _save(path: str | os.PathLike, kind: str, arrays: Matrices, shapes: Shapes, metadata: dict[str, Any]) -> None:
    about = json.dumps({"kind": kind, "shapes": shapes, "metadata": metadata})
    # safetensors stores the buffer of a transposed array as if it were contiguous.
    stored = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with new_file(path) as temporary:
        save_file(stored, temporary, metadata={"jaxsafe": about})


@contextlib.contextmanager
def _open(path: str | os.PathLike, kind: str) -> Iterator[tuple[Callable[[str], np.ndarray], dict, dict]]:
    """(reader of a tensor by name, {name: shape of its matrix}, metadata) of a file that holds `kind`."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no {kind} at {path}")
    with reading(path, "is not a whole safetensors file"), safe_open(path, framework="numpy") as file:
        about = _about(file.metadata() or {})
        if about["kind"] != kind:
            raise ValueError(f"{path} holds {about['kind']}, not {kind}")
        shapes = {name: tuple(shape) for name, shape in about["shapes"].items()}
        if shapes.keys() != set(file.keys()):
            odd = min(shapes.keys() ^ set(file.keys()))
            raise ValueError(f"{path}: its tensors are not those that its metadata names, first {odd!r}")
        yield file.get_tensor, shapes, about["metadata"]


def _about(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        about = json.loads(metadata.get("jaxsafe", "{}"))
    except json.JSONDecodeError:
        about = {}
    whole = isinstance(about, dict) and {"kind", "shapes", "metadata"} <= about.keys()
    return about if whole else {"kind": "nothing of this library"}


def _tree(
    path: str | os.PathLike,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    matrix: Callable[[str], np.ndarray],
    dtype: np.dtype,
    mesh: Mesh | None,
) -> dict[str, Any]:
    table = linear_maps(config)
    names = {key: [weight.hf.format(layer) for layer in range(config.layers)] for key, weight in table.items()}
    expected = hf_shapes(config)
    if unknown := sorted(shapes.keys() - {name for row in names.values() for name in row}):
        raise ValueError(f"{path} was made for another model: this one has no linear map {unknown[0]!r}")
    out = {}
    for key, weight in table.items():
        present = [name for name in names[key] if name in shapes]
        for name in present:
            if shapes[name] != expected[name]:
                seen, asked = shapes[name], expected[name]
                raise ValueError(f"{path} was made for another model: {name} is {seen}; the config asks {asked}")
        if not present:
            continue
        if missing := sorted(set(names[key]) - set(present)):
            raise ValueError(f"{path} was made for another model: it lacks {missing[0]!r}")
        leaf = np.empty((config.layers, *layer_shape(config, weight)), dtype)
        for layer, name in enumerate(names[key]):
            leaf[layer] = from_matrix(config, weight, matrix(name))
        sharding = None if mesh is None else NamedSharding(mesh, partition_spec(config, weight, mesh))
        out[key] = jax.device_put(leaf, sharding)
    return nest(out)
