"""Runs of adapters on one frozen model that are trained at once: the weights are there once, adapters by run.

A run is what it is alone: the same batches, rates, adapters and dropped inputs, and checkpoints that either way of
training goes on from. Adapters of fewer ranks are padded with zeros, which no gradient moves.

N runs, B batch, T slots, L layers, I and O input and output axes of a linear map, R rank
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsafe.io.checkpoint import note, open_checkpoints, outline, restore, save, stoppable
from jaxsafe.kernels.lora import LoRA
from jaxsafe.kernels.training import Recipe, batch_plan, one_step
from jaxsafe.methods.course import Saving, State, course
from jaxsafe.methods.trainer import FREE, FineTuning, Step, begin, check_rows, identity, joined, weights_program
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.rows import Batch, Row, pad_rows

Folder = str | os.PathLike


@dataclasses.dataclass(frozen=True)
class Training:
    """A run by its rows, its settings and the folder of its checkpoints, None to keep none."""

    rows: Sequence[Row]
    settings: FineTuning
    folder: Folder | None = None


def shared(settings: FineTuning) -> FineTuning:
    """`settings` without what may differ between runs that are trained at once: seed, rate, rank and its weight.

    Raises ValueError for settings that train no adapters, and for batches without a shape of their own.
    """
    if settings.lora is None or settings.slots is None:
        raise ValueError("runs that are trained at once need adapters (lora) and a shape of batches (slots)")
    adapters = dataclasses.replace(settings.lora, rank=1, alpha=1.0)
    return dataclasses.replace(settings, seed=0, learning_rate=1.0, lora=adapters)


def train_together(
    config: ModelConfig, params: Params, runs: Sequence[Training], mesh: Mesh | None = None
) -> Generator[tuple[Step, ...], None, None]:
    """What `train` yields of each of `runs`, which differ in rows, seed, learning rate and rank alone.

    Runs go on from their latest checkpoints, which must be of the same step. Signals and closing are as of `train`.
    Raises ValueError as `train` and `shared` do, for runs that differ in more, and for checkpoints of several steps.
    """
    if len({shared(run.settings) for run in runs}) != 1:
        raise ValueError(f"{len(runs)} runs need the same settings but for rows, seed, learning rate and rank")
    for run in runs:
        check_rows(config, run.rows, run.settings, mesh)
    return _steps(config, params, runs, mesh)


def latest_step(folder: Folder | None) -> int:
    """The step of the latest checkpoint in `folder`, 0 where there is none."""
    if folder is None or not pathlib.Path(folder).is_dir():
        return 0
    with open_checkpoints(folder) as checkpoints:
        return 0 if checkpoints.latest is None else checkpoints.latest.step


def _steps(
    config: ModelConfig, params: Params, runs: Sequence[Training], mesh: Mesh | None
) -> Generator[tuple[Step, ...], None, None]:
    settings = runs[0].settings
    ranks = [_lora(run).rank for run in runs]
    plans = [batch_plan([1] * len(run.rows), settings.batch_size, settings.steps, run.settings.seed) for run in runs]
    each = [begin(config, params, run.rows, run.settings, FREE, mesh) for run in runs]
    trees, fixed, (recipe, *_) = zip(*each, strict=True)
    weights = weights_program(config, params, settings, FREE)
    together = fixed_together(fixed)
    shared_start = min(joined(run.rows, run.settings, mesh) for run in runs)

    with contextlib.ExitStack() as stack:
        saves = any(run.folder is not None for run in runs)
        whole = stack.enter_context(stoppable()) if saves else contextlib.nullcontext
        kept = [stack.enter_context(open_checkpoints(run.folder)) if run.folder else None for run in runs]
        names = [
            {} if store is None else identity(params, run.rows, run.settings, FREE)
            for run, store in zip(runs, kept, strict=True)
        ]
        found = [_resumed(store, tree, name) for store, tree, name in zip(kept, trees, names, strict=True)]
        if len({done for done, _, _ in found}) > 1:
            raise ValueError(f"checkpoints are of steps {[done for done, _, _ in found]}; they must be of the same one")
        adapters = stacked([resized(own, max(ranks)) for _, own, _ in found])
        begun = State(found[0][0], adapters, [loss for _, _, loss in found])
        del each, trees, found, adapters

        def take(i: int, tree: Any) -> tuple[Any, list[float]]:
            batch = put([_batch(run, plan[i], shared_start) for run, plan in zip(runs, plans, strict=True)], mesh)
            tree, nats = program(recipe)(tree, batch, together)
            return tree, [float(loss) for loss in nats]

        def steps_of(state: State, begins: bool = False) -> tuple[Step, ...]:
            of_all = [member(state.tree["params"], np.int32(n), rank) for n, rank in enumerate(ranks)]
            return tuple(
                Step(state.done, loss, functools.partial(weights, adapters, own), begins, adapters)
                for loss, adapters, own in zip(state.loss, of_all, fixed, strict=True)
            )

        def keep(state: State) -> None:
            for n, (store, name) in enumerate(zip(kept, names, strict=True)):
                if store is not None:
                    save(store, state.done, member(state.tree, np.int32(n), ranks[n]), name, state.loss[n])

        saving = Saving(keep, settings.checkpoint_every, whole, settings.checkpoint_end) if saves else None
        yield steps_of(begun, begins=True)
        for state in stack.enter_context(contextlib.closing(course(begun, settings.steps, take, saving))):
            yield steps_of(state)


def _batch(run: Training, indices: np.ndarray, shared: int) -> Batch:
    assert run.settings.slots is not None
    return pad_rows([run.rows[j] for j in indices], run.settings.slots[0], run.settings.batch_size, shared=shared)


def _lora(run: Training) -> LoRA:
    assert run.settings.lora is not None
    return run.settings.lora


def _resumed(checkpoints: Any, tree: Any, name: dict[str, Any]) -> tuple[int, Any, float | None]:
    """The step that a run goes on from, its tree there, and the loss of that step."""
    if checkpoints is None or checkpoints.latest is None:
        return 0, tree, None
    done, kept = restore(checkpoints, outline(tree), name) or (0, tree)
    return done, kept, note(checkpoints)


@jax.jit
def stacked(trees: Sequence[Any]) -> Any:
    """One tree of the arrays of several, [N, ...]."""
    return jax.tree.map(lambda *parts: jnp.stack(parts), *trees)


@functools.partial(jax.jit, static_argnames="rank")
def member(tree: Any, n: Any, rank: int) -> Any:
    """The tree of run `n` out of a stacked one, with adapters of its own `rank`."""
    return resized(jax.tree.map(lambda a: a[n], tree), rank)


def resized(tree: Any, rank: int) -> Any:
    """`tree` with `rank` ranks of all adapters (and of their moments): more are zeros, and fewer the first ones."""

    def one(path: Any, leaf: Any) -> Any:
        axis = {"a": leaf.ndim - 1, "b": 1}.get(getattr(path[-1], "key", ""))
        if axis is None:
            return leaf
        more = [(0, max(0, rank - leaf.shape[axis])) if n == axis else (0, 0) for n in range(leaf.ndim)]
        return jax.lax.slice_in_dim(jnp.pad(leaf, more), 0, rank, axis=axis)

    return jax.tree_util.tree_map_with_path(one, tree)


OWN = ("rate", "scale")
"""What each run has of its own among what is fixed."""


def fixed_together(fixed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is fixed of all runs: the weights once, numbers by run, [N]."""
    return {**fixed[0], **{name: jnp.stack([each[name] for each in fixed]) for name in OWN}}


@functools.lru_cache(maxsize=4)
def program(recipe: Recipe) -> Any:
    """`step(tree, batch, fixed)` of stacked runs; the tree given to it is consumed."""
    fixed = {"params": None, "frozen": None, **dict.fromkeys(OWN, 0)}
    return jax.jit(jax.vmap(functools.partial(one_step, recipe), in_axes=(0, 0, fixed)), donate_argnums=0)


def put(batches: Sequence[Batch], mesh: Mesh | None) -> Any:
    """Batches of all runs on the devices, [N, B, ...], B split over `data`."""
    whole = jax.tree.map(lambda *parts: np.stack(parts), *batches)
    return jax.device_put(whole, None if mesh is None else NamedSharding(mesh, PartitionSpec(None, "data")))
