"""Checkpoints of a run by step: written in the background, whole or not at all, and read back onto any devices."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp


def open_checkpoints(folder: str | os.PathLike, keep: int = 2) -> ocp.training.Checkpointer:
    """The checkpoints in `folder` (local or gs://, made where it is absent), of which the latest `keep` stay.

    Use as a context: leaving it waits for what is being written. What a killed run left half-written is removed.
    """
    return ocp.training.Checkpointer(
        os.fspath(folder) if "://" in os.fspath(folder) else os.path.abspath(folder),
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )


def save(checkpoints: ocp.training.Checkpointer, step: int, tree: Any, run: Mapping[str, Any]) -> None:
    """Copies `tree` as it stands after `step` steps and writes it in the background; waits for an earlier save.

    `run` says what the tree follows from, in values of JSON.
    """
    checkpoints.save_async(step, tree, force=True, custom_metadata={"run": dict(run)})


def restore(checkpoints: ocp.training.Checkpointer, like: Any, run: Mapping[str, Any]) -> tuple[int, Any] | None:
    """The latest step and its tree, or None where there is no checkpoint.

    `like` is a tree of `jax.ShapeDtypeStruct`s with the shardings to read to (see `outline`). Raises ValueError
    where the checkpoint is of another `run`.
    """
    latest = checkpoints.latest
    if latest is None:
        return None
    saved = checkpoints.metadata(latest.step).custom_metadata or {}
    saved = saved.get("run", {})
    for name in sorted({*saved, *run}):
        if saved.get(name) != run.get(name):
            raise ValueError(
                f"{checkpoints.directory} holds a run with {name} {saved.get(name)!r}; this one has "
                f"{run.get(name)!r}: give another folder, or remove that one"
            )
    return latest.step, checkpoints.load(latest.step, like)


def outline(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def checksum(tree: Any) -> list[int]:
    """A number of 32 bits a leaf that follows from the leaf's bits and their places, however it is sharded."""
    return [int(n) for n in jax.device_get(_checksums(jax.tree.leaves(tree)))]


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(a: jax.Array) -> jax.Array:
        bits = a if a.dtype == bool else jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}")
        place = jnp.arange(a.size, dtype=jnp.uint32).reshape(a.shape)
        return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return [one(jnp.asarray(leaf)) for leaf in leaves]


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Yields `asked(step)`: whether this run was asked to end (SIGTERM, which a machine sends before it is taken).

    Several processes agree on the step by JAX's preemption service. One listens by itself, in its main thread, and
    on leaving hands the signal on to whoever listened before, which by default ends the process.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():  # which alone may listen to signals
        yield lambda step: False
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
        if asked.is_set():
            if callable(before):
                before(signal.SIGTERM, None)
            else:
                signal.raise_signal(signal.SIGTERM)
