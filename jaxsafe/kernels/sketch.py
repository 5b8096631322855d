"""A sketch of weights: a few numbers of each, from which follows how far two models of one shape are apart.

A weight is multiplied along every axis by fixed random signs. The mean square of the difference of two such products
estimates the squared norm of the difference of the weights (Johnson and Lindenstrauss), in whatever dtype each was.
"""

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import flatten
from jaxsafe.parallel import fetch

PRODUCTS = 16
"""Products of each weight."""
Sketch = Mapping[str, Sequence[float]]
"""By path of a weight: its norm, and its products with signs."""


def sketch(params: Params) -> Sketch:
    """The sketch of all weights, one pass over them."""
    flat = flatten(params)
    signs = {path: [_signs(path, axis, n) for axis, n in enumerate(weight.shape)] for path, weight in flat.items()}
    return {path: [float(number) for number in numbers] for path, numbers in fetch(_sketch(flat, signs)).items()}


def distance(first: Sketch, second: Sketch) -> float:
    """How far two models of one shape are apart: the root of the mean over weights of |W - W'|^2 / |W|^2.

    About 0.0016 for a model and the same in bfloat16, about 1.4 for two models that have nothing in common.
    Raises ValueError for models of different weights.
    """
    if first.keys() != second.keys():
        raise ValueError(f"models of different weights, as {min(first.keys() ^ second.keys())!r}, have no distance")
    parts = []
    for path in first:
        (norm, *products), (_, *others) = first[path], second[path]
        square = sum((a - b) ** 2 for a, b in zip(products, others, strict=True)) / len(products)
        parts.append(square / norm**2 if norm else float(square > 0))
    return math.sqrt(sum(parts) / len(parts))


@functools.cache
def _signs(path: str, axis: int, n: int) -> np.ndarray:
    """Signs [PRODUCTS, n] int8 that follow from the names alone, on any machine."""
    bits = np.frombuffer(hashlib.shake_256(f"{path} {axis}".encode()).digest(PRODUCTS * -(-n // 8)), np.uint8)
    return np.unpackbits(bits.reshape(PRODUCTS, -1), axis=1, count=n).astype(np.int8) * 2 - 1


@jax.jit
def _sketch(flat: Mapping[str, Any], signs: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    return {path: _numbers(weight, signs[path]) for path, weight in flat.items()}


def _numbers(weight: Any, signs: Sequence[Any]) -> Any:
    product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
    *before, last = signs
    out = product("...n,kn->...k", weight, last.astype(weight.dtype))
    for each in reversed(before):
        out = product("...nk,kn->...k", out, each.astype(jnp.float32))
    norm = jnp.sqrt(jnp.square(weight.astype(jnp.float32)).sum())
    return jnp.concatenate([norm[None], out])
