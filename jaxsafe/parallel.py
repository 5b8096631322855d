"""Devices: a mesh from a line of text, and how rows and parameters lie on it."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsafe.devices import chip_of
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.weights import RULES, count_parameters, shapes, weights

AXES = ("data", "model")
CACHED = 16 * 2048
"""Tokens in the cache of a usual batch: 16 rows of 2,048."""
FILLED = 0.8
"""Share of a device's memory that weights and cache may take."""


def mesh_lengths(text: str) -> dict[str, int]:
    """{"data": n, "model": m} of a line such as "data:-1,model:2"; an axis that is not named has length 1.

    Raises ValueError for another axis, one named twice, a length that is not a number, and two axes of length -1.
    """
    given: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, length = part.partition(":")
        if axis not in AXES:
            raise ValueError(f"mesh axis {axis!r} in {text!r} is not known; axes are {', '.join(AXES)}")
        if axis in given:
            raise ValueError(f"mesh axis {axis!r} stands twice in {text!r}")
        if not re.fullmatch(r"-1|[1-9][0-9]*", length):
            raise ValueError(f"mesh axis {axis!r} in {text!r} needs a positive length or -1, got {length!r}")
        given[axis] = int(length)
    if list(given.values()).count(-1) > 1:
        raise ValueError(f"mesh {text!r} has two axes of length -1; at most one can take what is left")
    return dict.fromkeys(AXES, 1) | given


def parse_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `text`, e.g. "data:-1,model:2"; one axis may be -1, which takes what is left.

    Axes are `data` (rows) and `model` (wide axes of weights). Raises ValueError for a line that `mesh_lengths`
    refuses, and for a mesh that the devices do not fill.
    """
    devices = jax.devices() if devices is None else devices
    lengths = mesh_lengths(text)
    fixed = math.prod(length for length in lengths.values() if length != -1)
    lengths = {axis: max(1, len(devices) // fixed) if n == -1 else n for axis, n in lengths.items()}
    if math.prod(lengths.values()) != len(devices):
        raise ValueError(f"mesh {text!r} is {' x '.join(map(str, lengths.values()))}; there are {len(devices)} devices")
    return make_mesh(lengths, devices)


def make_mesh(lengths: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
    """The mesh of axes {"data": n, "model": m} over n * m `devices`."""
    shape = tuple(lengths[axis] for axis in AXES)
    # Linen's layers need Auto axes; JAX would choose Explicit ones.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def default_mesh(config: ModelConfig, devices: Sequence[Any], memory: float | None) -> Mesh | None:
    """The mesh for a model where none is asked for; None for a single device.

    `memory` is a device's, in bytes. The model axis is the shortest on which a device's share of the weights and of
    a cache of `CACHED` tokens takes at most `FILLED` of it, and 1 where the memory is not known. Raises ValueError
    where the weights alone are more than all devices hold.
    """
    if len(devices) == 1:
        return None
    item = jnp.dtype(config.dtype).itemsize
    cache = 2 * config.layers * CACHED * config.kv_heads * config.head_dim
    weights_bytes = item * count_parameters(shapes(config))
    need = weights_bytes + item * cache
    if memory is not None and weights_bytes > len(devices) * memory:
        held = f"{len(devices)} devices of {memory / 1e9:.3g} GB hold {len(devices) * memory / 1e9:.3g} GB"
        raise ValueError(f"the weights in {config.dtype} take {weights_bytes / 1e9:.3g} GB; {held}; use more devices")
    lengths = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
    fitting = [n for n in lengths if memory is None or need / n <= FILLED * memory]
    model = fitting[0] if fitting else lengths[-1]
    return make_mesh({"data": len(devices) // model, "model": model}, devices)


def device_memory(device: Any) -> float | None:
    """Bytes of the memory of a device; None for a CPU and where nobody knows."""
    if device.platform == "cpu":
        return None
    chip = chip_of(device.device_kind)
    return (device.memory_stats() or {}).get("bytes_limit") or (chip.memory if chip else None)


def undivided(config: ModelConfig, mesh: Mesh) -> tuple[str, ...]:
    """Axes that `mesh` does not divide, so that every device holds them whole, such as "kv_heads 2 by model 4"."""
    used = {axis for w in weights(config).values() for axis in w.inputs + w.outputs}
    return tuple(
        f"{axis} {getattr(config, axis)} by {target} {mesh.shape[target]}"
        for axis, target in RULES.items()
        if axis in used and getattr(config, axis) % mesh.shape[target]
    )


def per_device(
    f: Callable[..., Any], mesh: Mesh, in_axes: Sequence[int | None], axis_name: str = "data"
) -> Callable[..., Any]:
    """`f` run by every device of the mesh's `axis_name` on its own share, as `jax.pmap(f, axis_name, in_axes)` does.

    Arguments with `in_axes` 0 have a leading axis, one entry a device, which `f` does not see; those with None are
    the same for all. Results have that leading axis. `f` may use collectives over `axis_name`; the mesh's other
    axes are left to the compiler, so that weights may be split over them. Raises ValueError for another in_axes.

        sums = per_device(lambda params, batch: wanda_sums(config, params, batch), mesh, (None, 0))(params, batches)
    """
    if any(axis not in (0, None) for axis in in_axes):
        raise ValueError(f"in_axes {tuple(in_axes)} must hold 0 or None for every argument")

    def local(*args: Any) -> Any:
        own = [a if axis is None else jax.tree.map(lambda x: x[0], a) for a, axis in zip(args, in_axes, strict=True)]
        return jax.tree.map(lambda x: x[None], f(*own))

    specs = tuple(PartitionSpec() if axis is None else PartitionSpec(axis_name) for axis in in_axes)
    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=specs,
            out_specs=PartitionSpec(axis_name),
            axis_names={axis_name},
            check_vma=False,
        )
    )


def put_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays with leading axis B on the devices, B split over `data`.

    Raises ValueError where B is no multiple of the data axis.
    """
    if mesh is None:
        return jax.device_put(tree)
    n = mesh.shape["data"]
    for leaf in jax.tree.leaves(tree):
        if leaf.shape[0] % n:
            raise ValueError(f"a batch of {leaf.shape[0]} rows does not divide over {n} devices of the data axis")
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def fetch(tree: Any) -> Any:
    """`tree` with whole numpy arrays, on every process, wherever its arrays lie; all processes must call it."""

    def one(a: Any) -> Any:
        if not isinstance(a, jax.Array) or a.is_fully_addressable:
            return jax.device_get(a)
        return multihost_utils.process_allgather(a, tiled=True)

    return jax.tree.map(one, tree)


def banner() -> str:
    """One line that says which process of how many this is, and on which devices."""
    devices = jax.devices()
    return (
        f"process {jax.process_index()} of {jax.process_count()}, "
        f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), jax {jax.__version__}"
    )
