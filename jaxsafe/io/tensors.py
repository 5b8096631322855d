"""From named tensors in files to the parameter tree, read shard by shard."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxsafe.model.config import ModelConfig
from jaxsafe.model.weights import (
    Weight,
    hf_shapes,
    layer_shape,
    nest,
    partition_spec,
    sizes,
    weights,
)

Index = tuple[slice, ...]
# Buffers that old checkpoints carry and that follow from the configuration.
DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
ALIGNMENT = 64
"""Bytes, of the arrays that JAX uses without a copy."""
ROWS = 128
"""Rows of a stored matrix that are read at a time: they stay in a processor's cache while they are transposed."""


class TensorSource(Protocol):
    """Named tensors in Hugging Face's names and layouts."""

    where: str
    """What an error message calls it: the path."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """The part `index` of the tensor `name`, in a dtype of numpy or ml_dtypes."""
        ...


def load_params(config: ModelConfig, source: TensorSource, mesh: Mesh | None = None) -> dict[str, Any]:
    """The parameter tree of `config` from `source`, in `config.dtype`, laid out on `mesh` where there is one.

    Each process reads only the parts that its own devices hold. Raises ValueError for a missing or extra
    tensor, a wrong shape, and a value that is not finite.
    """
    check_names(config, source)
    return nest({path: _load(config, source, weight, mesh) for path, weight in weights(config).items()})


def check_names(config: ModelConfig, source: TensorSource) -> None:
    """Raises ValueError unless `source` holds the tensors of `config`, all of them, with their shapes."""
    expected, found, family = hf_shapes(config), source.shapes(), config.family
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ValueError(f"{source.where} lacks {len(missing)} tensors of a {family} model, first {missing[0]!r}")
    extra = {name for name in found.keys() - expected.keys() if not name.endswith(DERIVED)}
    if config.tied:
        extra -= {"lm_head.weight"}
    if extra:
        raise ValueError(f"{source.where} has {len(extra)} tensors that a {family} model lacks, first {min(extra)!r}")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise ValueError(f"{source.where}: {name} has shape {list(found[name])}; the config asks {list(shape)}")


def _load(config: ModelConfig, source: TensorSource, weight: Weight, mesh: Mesh | None) -> jax.Array:
    lead = (config.layers,) if weight.stacked else ()
    shape = lead + layer_shape(config, weight)
    dtype = jnp.dtype(config.dtype)

    def part(index: Index) -> np.ndarray:
        index = tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
        out = _aligned([s.stop - s.start for s in index], dtype)
        if not weight.stacked:
            _read_layer(config, source, weight, weight.hf, index, out)
        for row, layer in enumerate(range(index[0].start, index[0].stop) if weight.stacked else ()):
            _read_layer(config, source, weight, weight.hf.format(layer), index[1:], out[row])
        return out

    if mesh is None:
        return jax.device_put(part((slice(None),) * len(shape)))
    sharding = NamedSharding(mesh, partition_spec(config, weight, mesh))
    return jax.make_array_from_callback(shape, sharding, _once_per_part(part))


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX takes as it is on a CPU; one that begins elsewhere it copies."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _once_per_part(part: Callable[[Index], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Replicated parts are asked for once a device; read each of them once."""
    seen: dict[str, np.ndarray] = {}

    def cached(index: Index) -> np.ndarray:
        key = repr(index)
        if key not in seen:
            seen[key] = part(index)
        return seen[key]

    return cached


def _read_layer(
    config: ModelConfig, source: TensorSource, weight: Weight, name: str, index: Index, out: np.ndarray
) -> None:
    """Reads one layer's part, `index` over `inputs + outputs`, to `out`; it is rows and columns of a stored matrix."""
    n_in = len(weight.inputs)
    if weight.linear:
        rows = _flat_range(sizes(config, weight.outputs), index[n_in:])
        columns = _flat_range(sizes(config, weight.inputs), index[:n_in])
        _read(source, name, (rows, columns), out.reshape(-1, rows.stop - rows.start).T)
    elif weight.kind != "map":  # norms and biases are stored flat
        _read(source, name, (_flat_range(sizes(config, weight.outputs), index),), out.reshape(-1))
    else:
        _read(source, name, index, out)


def _read(source: TensorSource, name: str, index: Index, out: np.ndarray) -> None:
    """Reads the part `index` of the tensor `name` to `out`, a few rows of a matrix at a time."""
    rows, *columns = index
    step = ROWS if columns else rows.stop - rows.start
    for first in range(rows.start, rows.stop, step):
        stored = source.read(name, (slice(first, min(first + step, rows.stop)), *columns))
        if not _finite(stored):
            raise ValueError(f"{source.where}: {name} holds values that are not finite (NaN or infinity)")
        out[first - rows.start :][: len(stored)] = stored


def _finite(stored: np.ndarray) -> bool:
    """Whether no number is NaN or infinite: those of bfloat16 have all bits of the exponent set."""
    if stored.dtype == jnp.bfloat16:
        return bool(((stored.view(np.uint16) & 0x7FFF) < 0x7F80).all())
    return bool(np.isfinite(stored.astype(np.float32, copy=False)).all())


def _flat_range(lengths: tuple[int, ...], index: Index) -> slice:
    """The range of a flattened axis that `index` covers; only its first axis may be split."""
    inner = int(np.prod(lengths[1:]))
    for s, n in zip(index[1:], lengths[1:], strict=True):
        if (s.start, s.stop) != (0, n):
            raise ValueError(f"an inner axis of {lengths} is split ({s}); only the first one may be")
    return slice(index[0].start * inner, index[0].stop * inner)
