"""Soft prompts on disk, as safetensors."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxsafe.io.atomic import new_file
from jaxsafe.io.vectors import check_origin
from jaxsafe.model.soft_prompt import SoftPrompt, soft_prompt
from jaxsafe.reading import reading


def save_soft_prompt(path: str | os.PathLike, prompt: SoftPrompt, metadata: Mapping[str, Any]) -> None:
    """Writes `prompt` as vectors float32 [P, D] and first int32 []; `metadata` (JSON values) goes along.

    `metadata` should hold "model" (its name), "origin" (`ChatModel.origin`), which `load_soft_prompt` checks, and
    "system", the text whose place the vectors take: under another one they would lie elsewhere.
    """
    arrays = {"vectors": np.array(prompt.vectors[0], np.float32, order="C"), "first": np.array(prompt.first[0])}
    with new_file(path) as temporary:
        save_file(arrays, temporary, metadata={"jaxsafe": json.dumps(dict(metadata))})


def load_soft_prompt(
    path: str | os.PathLike, origin: Mapping[str, Any] | None = None
) -> tuple[SoftPrompt, dict[str, Any]]:
    """The `SoftPrompt` of `path`, an edit of the tap "embed", and its metadata.

    Raises FileNotFoundError, and ValueError for a file that holds no soft prompt, numbers that are not finite, or one
    made for another model than that of `origin` (`ChatModel.origin`); the dtype may be another.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no soft prompt at {path}")
    with reading(path, "is not a whole safetensors file"), safe_open(path, framework="numpy") as file:
        said = (file.metadata() or {}).get("jaxsafe", "null")
        arrays = {name: file.get_tensor(name) for name in {"vectors", "first"} & set(file.keys())}
    with reading(path, "holds metadata that cannot be read"):
        metadata = json.loads(said)
        if len(arrays) < 2 or not isinstance(metadata, dict):
            raise ValueError(f"{path} holds no soft prompt; vectors, first and metadata are expected")
        vectors, first = arrays["vectors"], arrays["first"]
        shapes = [list(vectors.shape), list(first.shape)]
        kinds = vectors.dtype == np.float32 and first.dtype == np.int32
        if not kinds or vectors.ndim != 2 or not vectors.size or first.shape or first < 0:
            raise ValueError(
                f"{path}: vectors {vectors.dtype} {shapes[0]} and first {first.dtype} {shapes[1]} are no soft prompt; "
                "float32 [tokens, features] and a position int32 [] are"
            )
        if not np.isfinite(vectors).all():
            raise ValueError(f"{path}: vectors holds numbers that are not finite")
        if origin is not None:
            check_origin(path, metadata, origin)
    return soft_prompt(vectors, int(first)), metadata
