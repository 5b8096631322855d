"""The one digest by which results, files and caches are told apart."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np


def digest(*content: Any) -> str:
    """Hex SHA-256 of values of JSON; mappings with equal entries have equal digests.

    Raises TypeError for what JSON cannot hold, and ValueError for a number that is not finite.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def arrays_sha256(arrays: Iterable[Any]) -> str:
    """Hex SHA-256 of arrays in their order: their types, shapes and bytes."""
    found = hashlib.sha256()
    for array in map(np.asarray, arrays):
        found.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
