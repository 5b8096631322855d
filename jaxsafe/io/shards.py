"""The safetensors files of a Hugging Face folder."""

import json
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from jaxsafe.io.tensors import Index
from jaxsafe.reading import read_json, reading

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
NARROW = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
"""Types that the safetensors package does not hand to NumPy."""


def weight_files(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The files that hold the weights of `folder`: model.safetensors, else those that its index names, else all.

    They need not be there. Raises ValueError for an index that is none.
    """
    folder = pathlib.Path(folder)
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if not (folder / INDEX).is_file():
        return sorted(folder.glob("*.safetensors"))
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{folder / INDEX} has weight_map {names!r:.80}; a file for each tensor is expected")
    for name in names.values():
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise ValueError(f"{folder / INDEX} names the file {name!r:.80}; only files beside it are read")
    return [folder / name for name in sorted(set(names.values()))]


class SafetensorsFolder:
    """The tensors of a folder's `weight_files` (a `TensorSource`); bytes are read when asked for.

    Raises FileNotFoundError for a file that is not there, ValueError for one that is damaged or holds no weights.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.where = str(folder)
        files = weight_files(folder)
        if not files:
            raise FileNotFoundError(f"no *.safetensors file in {folder} (pickled .bin weights are not read)")
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{folder} lacks {len(missing)} files that {INDEX} names, first {missing[0]!r}")
        self._held: dict[str, tuple[pathlib.Path, Any]] = {}
        for file in files:
            with reading(file, "is not a whole safetensors file"):
                handle = safe_open(file, framework="numpy")
                names = list(handle.keys())
            for name in names:
                if name in self._held:
                    raise ValueError(f"{folder}: tensor {name!r} stands in two files")
                self._held[name] = file, handle

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        return {name: tuple(handle.get_slice(name).get_shape()) for name, (_, handle) in self._held.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """The part `index` of tensor `name`, as stored. Raises ValueError for one that holds no floating numbers."""
        file, handle = self._held[name]
        with reading(file):
            stored = handle.get_slice(name)
            kind = stored.get_dtype()
            if kind in NARROW:
                return _mapped(file, name)[index]
            if kind in FLOATS:
                return stored[index]
        raise ValueError(f"{file}: {name} is stored as {kind}; use one of {', '.join((*FLOATS, *NARROW))}")


def _mapped(file: pathlib.Path, name: str) -> np.ndarray:
    """Tensor `name` of `file`, of a `NARROW` type, mapped from the disk."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(length))[name]
    begin, kind = 8 + length + entry["data_offsets"][0], NARROW[entry["dtype"]]
    return np.memmap(file, kind, "r", begin, tuple(entry["shape"]))
