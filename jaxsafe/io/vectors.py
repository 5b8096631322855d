"""Steering vectors on disk: safetensors for this library, GGUF control vectors for others."""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxsafe.io.atomic import new_file
from jaxsafe.kernels.sketch import distance
from jaxsafe.kernels.steering import Steering
from jaxsafe.model.config import ModelConfig
from jaxsafe.reading import reading

FIELDS = {
    "directions": np.float32,
    "reference": np.float32,
    "scored": np.float32,
    "threshold": np.float32,
    "strength": np.float32,
    "affirmative": np.int32,
}
"""The arrays of a `Steering` and their dtypes in a file."""
LARGEST = 1e18
"""Numbers of a control vector are smaller: squares of larger ones would be infinite in float32."""
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
    do not. Raises FileNotFoundError, and ValueError for a file that is no steering file, holds numbers that are not
    finite, or was made for another model than the one of `origin` (`ChatModel.origin`); the dtype may be another.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no steering vectors at {path}")
    with reading(path, "is not a whole safetensors file"), safe_open(path, framework="numpy") as file:
        names, said = set(file.keys()), (file.metadata() or {}).get("jaxsafe", "null")
        arrays: dict[str, Any] = {} if affirmative is None else {"affirmative": np.array(affirmative, np.int32)}
        arrays |= {name: file.get_tensor(name) for name in FIELDS.keys() & names}
    with reading(path, "holds metadata that cannot be read"):
        metadata = json.loads(said)
        missing = sorted(FIELDS.keys() - arrays.keys())
        if not isinstance(metadata, dict) or missing:
            raise ValueError(f"{path} holds no steering vectors of this library (lacks {missing or 'metadata'})")
        _check_arrays(path, arrays)
        if origin is not None:
            check_origin(path, metadata, origin)
    return Steering(**arrays), metadata


def _check_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for arrays of other types or shapes than a `Steering` has, and for numbers not finite."""
    layers, embed = np.shape(arrays["directions"]) if np.ndim(arrays["directions"]) == 2 else (0, 0)
    shapes = {"directions": (layers, embed), "reference": (layers, embed), "threshold": ()}
    shapes |= {"scored": (layers,), "strength": (layers,), "affirmative": (len(np.ravel(arrays["affirmative"])),)}
    for name, dtype in FIELDS.items():
        array = arrays[name]
        empty = array.size == 0 and name != "affirmative"
        if array.dtype != dtype or array.shape != shapes[name] or empty:
            raise ValueError(f"{path}: {name} is {array.dtype} {list(array.shape)}, which is no part of a steering")
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite")


def check_origin(path: str | os.PathLike, metadata: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Raises ValueError where the file at `path`, by its `metadata`, is of another model than that of `origin`."""
    made_for = metadata.get("origin")
    if not made_for:
        raise ValueError(
            f"{path} does not say which weights it was made for; save it with the metadata origin=model.origin()"
        )
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
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no control vector at {path}")
    import gguf

    with reading(path, "is not a whole GGUF file"):
        reader = gguf.GGUFReader(path)
        field = reader.fields.get("general.architecture")
        if field is None or field.contents() != "controlvector":
            raise ValueError(f"{path} is not a GGUF control vector")
        out = np.zeros((layers, embed), np.float32)
        for tensor in reader.tensors:
            number = re.fullmatch(r"direction\.(\d{1,6})", tensor.name)
            if number is None or tensor.data.dtype not in (np.float32, np.float16):
                kind = tensor.tensor_type.name
                raise ValueError(f"{path}: {tensor.name} ({kind}) is no direction.N of a block in float32 or float16")
            if not 0 < int(number[1]) < layers or tensor.data.shape != (embed,):
                shape = tensor.data.shape
                raise ValueError(f"{path}: {tensor.name} of {shape} does not fit {layers} blocks of {embed}")
            out[int(number[1])] = tensor.data
    if not out.any():
        raise ValueError(f"{path} holds no direction")
    if not (np.abs(out) < LARGEST).all():
        raise ValueError(f"{path} holds numbers that are not finite, or not below {LARGEST:g}")
    return out


def is_control_vector(path: str | os.PathLike) -> bool:
    """Whether the file at `path` is a GGUF file by its first bytes."""
    with pathlib.Path(path).open("rb") as file:
        return file.read(4) == b"GGUF"


def load_vectors(
    path: str | os.PathLike,
    config: ModelConfig,
    origin: Mapping[str, Any] | None = None,
    affirmative: Sequence[int] | None = None,
) -> tuple[Steering, dict[str, Any]]:
    """The `Steering` of a steering file or of a GGUF control vector, for the model `config`, and its metadata.

    A control vector, which says of no weights that it was made for them, is added whatever the prompt: its classifier
    takes every prompt for harmful; `affirmative` are tokens for it to read. Raises as `load_steering` and
    `load_control_vector` do, and ValueError for a steering of another shape of model.
    """
    if pathlib.Path(path).is_file() and is_control_vector(path):
        added = load_control_vector(path, config.layers, config.embed)
        strength = np.linalg.norm(added, axis=1)
        arrays: dict[str, Any] = {
            "directions": added / np.where(strength > 0, strength, 1)[:, None],
            "reference": np.zeros_like(added),
            "scored": np.ones(config.layers, np.float32),
            "threshold": np.float32(-1),
            "strength": strength,
            "affirmative": np.array([0] if affirmative is None else affirmative, np.int32),
        }
        return Steering(**arrays), {}
    steering, metadata = load_steering(path, origin, affirmative)
    if (shape := np.shape(steering.directions)) != (config.layers, config.embed):
        ours = f"the model has {config.layers} of {config.embed}"
        raise ValueError(f"{path} is of {shape[0]} blocks of {shape[1]}; {ours}")
    return steering, metadata
