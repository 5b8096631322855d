"""Running sums over a data set: one pass, any number of devices, resumable, kept with what they were made from.

L layers
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxsafe.io.atomic import new_file
from jaxsafe.kernels.importance import gram_sums, input_taps, no_sums, snip_sums, wanda_sums
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import flatten, linear_maps, nest, partition_spec, sizes
from jaxsafe.parallel import fetch, per_device
from jaxsafe.text.batches import Batch, Row, bucket, group_by_length, pad_rows, row_bucket
from jaxsafe.text.chat import check_context

KINDS = ("snip", "wanda", "gram")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over `n` samples of one `kind`: "snip" (tree of the maps), "wanda" and "gram" (by tap). Float32."""

    kind: str
    sums: Mapping[str, Any]
    n: int


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of both data sets together. Raises ValueError for different kinds."""
    if a.kind != b.kind:
        raise ValueError(f"statistics of kind {a.kind!r} and {b.kind!r} cannot be merged")
    return Statistics(a.kind, jax.tree.map(jnp.add, a.sums, b.sums), a.n + b.n)


def outline(kind: str, config: ModelConfig) -> Any:
    """The sums of `kind` as `jax.ShapeDtypeStruct`s. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"statistics {kind!r} are not known; use one of {', '.join(KINDS)}")
    if kind == "snip":
        return jax.eval_shape(lambda: no_sums(config))
    width = {str(w.tap): int(np.prod(sizes(config, w.inputs))) for w in linear_maps(config).values()}
    square = (lambda F: (F, F)) if kind == "gram" else (lambda F: (F,))
    taps = input_taps(config)
    return {tap: jax.ShapeDtypeStruct((config.layers, *square(width[tap])), jnp.float32) for tap in taps}


def shardings(kind: str, config: ModelConfig, mesh: Mesh) -> Any:
    """How the sums of `kind`, one entry a device of the data axis in front, lie on `mesh`.

    SNIP's as the weights are split over the model axis, the others by features where that axis divides them.
    """
    shape = outline(kind, config)
    if kind == "snip":
        table = linear_maps(config)
        wide = {
            path: [a if a == "model" else None for a in partition_spec(config, table[path], mesh)] for path in table
        }
        return nest({path: NamedSharding(mesh, PartitionSpec("data", *spec)) for path, spec in wide.items()})

    def split(a: Any) -> NamedSharding:
        fits = a.shape[1] % mesh.shape["model"] == 0
        return NamedSharding(mesh, PartitionSpec("data", None, "model" if fits else None))

    return jax.tree.map(split, shape)


def nothing(kind: str, config: ModelConfig) -> Any:
    """The sums of no samples. Raises ValueError for an unknown kind."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), outline(kind, config))


def added(
    kind: str,
    config: ModelConfig,
    params: Params,
    batch: Batch,
    sums: Any,
    positions: str,
    loss: str,
    last: int | None,
) -> Any:
    """`sums` with those of `batch` added."""
    if kind == "snip":
        return snip_sums(config, params, batch, sums, positions, loss, last)
    if kind == "gram":
        return jax.tree.map(jnp.add, sums, gram_sums(config, params, batch, positions, last))
    return jax.tree.map(jnp.add, sums, wanda_sums(config, params, batch, positions))


_STATIC = ("kind", "config", "positions", "loss", "last", "mesh")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames=("sums",))
def add_batch(
    kind: str,
    config: ModelConfig,
    params: Params,
    batch: Batch,
    sums: Any,
    positions: str,
    loss: str,
    last: int | None,
    mesh: Mesh | None,
) -> Any:
    """`sums` with those of `batch` added; on a mesh `sums` has one entry a device of the data axis in front."""
    if mesh is None:
        return added(kind, config, params, batch, sums, positions, loss, last)
    n = mesh.shape["data"]
    shares = jax.tree.map(lambda a: a.reshape(n, a.shape[0] // n, *a.shape[1:]), batch)

    def own(params: Params, batch: Batch, sums: Any) -> Any:
        return added(kind, config, params, batch, sums, positions, loss, last)

    out = per_device(own, mesh, (None, 0, 0))(params, shares, sums)
    return jax.lax.with_sharding_constraint(out, shardings(kind, config, mesh))


def gather(
    kind: str,
    config: ModelConfig,
    params: Params,
    rows: Sequence[Row],
    batch_size: int = 8,
    positions: str = "response",
    loss: str = "mean",
    mesh: Mesh | None = None,
    start: tuple[Any, int] | None = None,
    after_batch: Callable[[Callable[[], Any], int, int], None] = lambda sums, batches, rows: None,
) -> Statistics:
    """The `kind` of statistics of `rows` (prompts with their answers), in one pass of batches formed by length.

    On a mesh every device sums over its own rows, and the sums of all are added once, at the end. `start` are
    the sums of the first so many batches, from an interrupted pass; `after_batch` hears of the sums so far, how
    many batches they are of, and how many rows the last one had. Raises ValueError for no rows, rows without a
    counted token, rows longer than the context, an unknown kind, and a batch that does not fit memory.
    """
    if not rows:
        raise ValueError("there are no rows to score; give at least one prompt with its answer")
    check_context(rows, config.context)
    blank = [i for i, row in enumerate(rows) if positions == "response" and row.instruction_end + 1 >= len(row.ids)]
    if blank:
        raise ValueError(f"row {blank[0]} has no answer; positions='response' needs at least one answer token a row")
    groups = group_by_length([len(row.ids) for row in rows], batch_size)
    multiple = 1 if mesh is None else mesh.shape["data"]
    sums, first = (None, 0) if start is None else start
    if mesh is not None:
        sums = _per_device_sums(kind, config, mesh, sums)
    elif sums is None:
        sums = nothing(kind, config)
    for number, group in enumerate(groups[first:], first + 1):
        batch = pad_rows([rows[i] for i in group], count=row_bucket(len(group), batch_size, multiple))
        answers = batch.tokens.shape[1] - 1 - int(batch.instruction_end.min())
        last = min(bucket(answers), batch.tokens.shape[1]) if positions == "response" else None
        try:
            sums = add_batch(kind, config, params, batch, sums, positions, loss, last, mesh)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(f"{len(group)} rows do not fit memory; give a batch_size below {batch_size}") from None
        after_batch(functools.partial(_all_devices, sums, mesh), number, len(group))
    return Statistics(kind, _all_devices(sums, mesh), len(rows))


def _per_device_sums(kind: str, config: ModelConfig, mesh: Mesh, sums: Any) -> Any:
    """`sums` (None: of no samples) in the first of as many entries as the data axis has devices, the others empty."""

    def spread(sums: Any) -> Any:
        empty = jax.tree.map(lambda a: jnp.zeros((mesh.shape["data"], *a.shape), a.dtype), outline(kind, config))
        return empty if sums is None else jax.tree.map(lambda a, s: a.at[0].set(s), empty, sums)

    return jax.jit(spread, out_shardings=shardings(kind, config, mesh))(sums)


def _all_devices(sums: Any, mesh: Mesh | None) -> Any:
    return sums if mesh is None else jax.jit(lambda tree: jax.tree.map(lambda a: a.sum(0), tree))(sums)


def data_sha256(rows: Sequence[Row]) -> str:
    """Digest of the rows, in their order."""
    content = [[list(map(int, row.ids)), row.instruction_end] for row in rows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def gather_once(
    path: str | os.PathLike,
    kind: str,
    config: ModelConfig,
    params: Params,
    rows: Sequence[Row],
    model: str,
    batch_size: int = 8,
    positions: str = "response",
    loss: str = "mean",
    mesh: Mesh | None = None,
    every: int = 16,
    done: Callable[[int], None] = lambda n: None,
) -> Statistics:
    """`gather`, kept in the file `path`: what is there already for the same data and `model` is not made again.

    `model` is the fingerprint of the model's weights. The sums so far are written every `every` batches, so that
    an interrupted pass goes on from there.
    """
    path = pathlib.Path(path)
    meta = {
        "kind": kind,
        "model": model,
        "data": data_sha256(rows),
        "n": len(rows),
        "positions": positions,
        "loss": loss if kind == "snip" else None,
    }
    groups = group_by_length([len(row.ids) for row in rows], batch_size)
    meta["of"] = len(groups)
    sums, first = _read_partial(path, meta)
    done(sum(len(group) for group in groups[:first]))
    if first == len(groups):
        return Statistics(kind, sums, len(rows))

    def keep(read: Callable[[], Any], number: int, count: int) -> None:
        if number % every == 0 or number == len(groups):
            _write(path, read(), meta | {"batches": number})
        done(count)

    start = None if sums is None else (sums, first)
    return gather(kind, config, params, rows, batch_size, positions, loss, mesh, start, keep)


def _write(path: pathlib.Path, sums: Any, meta: Mapping[str, Any]) -> None:
    with new_file(path) as temporary:
        save_file(flatten(fetch(sums)), temporary, metadata={"statistics": json.dumps(meta)})


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    # What lies on one process's devices could not be given to a program of several.
    framework = "flax" if jax.process_count() == 1 else "numpy"
    try:
        with safe_open(path, framework=framework) as file:
            meta = json.loads((file.metadata() or {}).get("statistics", "null"))
            if meta is None:
                raise ValueError(f"{path} holds no statistics")
            return nest({name: file.get_tensor(name) for name in file.keys()}), meta  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def _read_partial(path: pathlib.Path, wanted: Mapping[str, Any]) -> tuple[Any, int]:
    """The sums in `path` and of how many batches they are, or (None, 0) where they are of something else."""
    if not path.is_file():
        return None, 0
    sums, meta = _read(path)
    batches = meta.pop("batches")
    return (sums, batches) if meta == dict(wanted) else (None, 0)


def load_statistics(path: str | os.PathLike, model: str) -> Statistics:
    """Statistics kept by an earlier run, for the model of this fingerprint.

    Raises FileNotFoundError, and ValueError for a file of something else, of another model, or of a pass that
    was interrupted.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no statistics at {path}")
    sums, meta = _read(path)
    if meta["model"] != model:
        raise ValueError(f"{path} is of the model {meta['model'][:12]}; this model is {model[:12]}: score it anew")
    if meta["batches"] < meta["of"]:
        raise ValueError(f"{path} holds {meta['batches']} of {meta['of']} batches; run the scoring to its end")
    return Statistics(meta["kind"], sums, meta["n"])
