"""Steering vectors on disk: safetensors for this library, GGUF control vectors for others."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxsafe.io.atomic import new_file
from jaxsafe.kernels.sketch import distance
from jaxsafe.kernels.steering import Steering

FIELDS = {
    "directions": np.float32,
    "reference": np.float32,
    "scored": np.float32,
    "threshold": np.float32,
    "strength": np.float32,
    "affirmative": np.int32,
}
"""The arrays of a `Steering` and their dtypes in a file."""
SAME = 0.005
"""The distance up to which weights are those of one model: three times that of rounding to bfloat16."""


def save_steering(path: str | os.PathLike, steering: Steering, metadata: dict[str, Any]) -> None:
    """Writes `steering` with the classifier's reference and threshold; `metadata` (JSON values) goes along.

    `metadata` should hold "model" (its name) and "origin" (`ChatModel.origin`), which `load_steering` checks.
    """
    arrays = {name: np.array(getattr(steering, name), dtype, order="C") for name, dtype in FIELDS.items()}
    with new_file(path) as temporary:
        save_file(arrays, temporary, metadata={"jaxsafe": json.dumps(metadata)})


def load_steering(
    path: str | os.PathLike, origin: Mapping[str, Any] | None = None, affirmative: Sequence[int] | None = None
) -> tuple[Steering, dict[str, Any]]:
    """The `Steering` of `path` and its metadata.

    `affirmative` are the token ids of the affirmative for a file that does not hold them, as files of version 0.1.0
    do not. Raises FileNotFoundError, and ValueError for a file that is no steering file or was made for another model
    than the one of `origin` (`ChatModel.origin`); the dtype may be another.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no steering vectors at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {}).get("jaxsafe", "null"))
            arrays: dict[str, Any] = {} if affirmative is None else {"affirmative": np.array(affirmative, np.int32)}
            arrays |= {name: file.get_tensor(name) for name in FIELDS.keys() & set(file.keys())}
            missing = sorted(FIELDS.keys() - arrays.keys())
            if metadata is None or missing:
                raise ValueError(f"{path} holds no steering vectors of this library (lacks {missing or 'metadata'})")
            steering = Steering(**arrays)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if origin is not None:
        _check_origin(path, metadata, origin)
    return steering, metadata


def _check_origin(path: str | os.PathLike, metadata: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    made_for = metadata.get("origin")
    if not made_for:
        raise ValueError(f"{path} does not say which weights it was made for; make it anew")
    if made_for["configuration"] != origin["configuration"]:
        raise ValueError(f"{path} was made for {metadata.get('model')!r}, a model of another configuration")
    if (apart := distance(made_for["sketch"], origin["sketch"])) > SAME:
        name = f"{metadata.get('model')!r}, a model of the same shape with other weights"
        raise ValueError(f"{path} was made for {name} (they are {apart:.3g} apart; rounding makes less than {SAME})")


def save_control_vector(path: str | os.PathLike, steering: Steering, family: str) -> None:
    """Writes strength * direction of each steered block as a GGUF control vector, toward refusal.

    The format numbers blocks from 1 on, so block 0 has no place in it: ValueError where it is steered.
    """
    import gguf

    added = np.asarray(steering.strength)[:, None] * np.asarray(steering.directions)
    if np.any(added[0]):
        raise ValueError("a GGUF control vector cannot steer block 0; steer blocks from 1 on")
    with new_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", family)
        writer.add_uint32("controlvector.layer_count", len(added) - 1)
        for layer in range(1, len(added)):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(added[layer], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def load_control_vector(path: str | os.PathLike, layers: int, embed: int) -> np.ndarray:
    """The vectors [layers, embed] float32 that a GGUF control vector adds to each block's output.

    Raises FileNotFoundError, and ValueError for another kind of file or another shape of model.
    """
    import gguf

    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no control vector at {path}")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from None
    field = reader.fields.get("general.architecture")
    if field is None or field.contents() != "controlvector":
        raise ValueError(f"{path} is not a GGUF control vector")
    out = np.zeros((layers, embed), np.float32)
    for tensor in reader.tensors:
        layer = int(tensor.name.removeprefix("direction."))
        if not 0 < layer < layers or tensor.data.shape != (embed,):
            raise ValueError(f"{path}: {tensor.name} of {tensor.data.shape} does not fit {layers} blocks of {embed}")
        out[layer] = tensor.data
    return out
