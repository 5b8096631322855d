"""Checkpoints of a run by step: written in the background, whole or not at all, and read back onto any devices."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import FrameType
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


def save(
    checkpoints: ocp.training.Checkpointer, step: int, tree: Any, run: Mapping[str, Any], note: float | None = None
) -> None:
    """Copies `tree` as it stands after `step` steps and writes it in the background; waits for an earlier save.

    `run` says what the tree follows from, in values of JSON; `note` is a number beside it.
    """
    checkpoints.save_async(step, tree, force=True, custom_metadata={"run": dict(run), "note": note})


def note(checkpoints: ocp.training.Checkpointer) -> float | None:
    """The note of the latest checkpoint, None where there is none."""
    latest = checkpoints.latest
    return None if latest is None else (checkpoints.metadata(latest.step).custom_metadata or {}).get("note")


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


def preempted(step: int) -> bool:
    """Whether several processes, which must agree on the step, were asked to end by JAX's preemption service."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Yields `whole()`, a context that Ctrl-C and SIGTERM wait for; outside of it they end the run at once.

    They go to whoever listened before, and raise SystemExit(128 + number) where that raises nothing. Of one process
    alone, and in its main thread, which alone may listen to signals; elsewhere nothing waits.
    """
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield contextlib.nullcontext
        return
    held, waiting = threading.Event(), list[int]()

    def heard(number: int, frame: FrameType | None) -> None:
        if held.is_set():
            waiting.append(number)
            return
        listener = before[number]
        if callable(listener):
            listener(number, frame)
        raise SystemExit(128 + number)

    @contextlib.contextmanager
    def whole() -> Iterator[None]:
        held.set()
        try:
            yield
        finally:
            held.clear()
            if waiting:
                heard(waiting.pop(), None)

    listeners = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {n: listener for n, listener in listeners.items() if listener not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, heard)
    try:
        yield whole
    finally:
        for number, listener in before.items():
            signal.signal(number, listener)
