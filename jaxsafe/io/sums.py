"""Sums over data sets, kept in a store: an interrupted pass goes on, a finished one is read."""

from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsafe.io.store import HOST_TREE, TREE, Json, Store
from jaxsafe.kernels.sums import Scoring, Statistics, Sums, batches_of, gather_parts, shardings
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.progress import Progress, silent
from jaxsafe.rows import Row, data_sha256


class Model(Protocol):
    """What sums are made of, a `ChatModel` for one."""

    @property
    def config(self) -> ModelConfig:
        """Its sizes."""

    @property
    def params(self) -> Params:
        """Its weights."""

    @property
    def mesh(self) -> Mesh | None:
        """The devices that they lie on."""

    def fingerprint(self) -> str:
        """A digest of all of it."""


def sums_once(
    store: Store, scoring: Scoring, model: Model, rows: Sequence[Row], done: Progress = silent, every: int = 16
) -> Statistics:
    """`gather`, kept in `store` by model, data and scoring: what is there is not made again.

    They lie on the devices of the model. What there is so far is kept every `every` batches, so that an interrupted
    pass goes on from there. `done` is called with numbers of finished rows, those of an earlier run among them. Raises
    ValueError as `gather_parts` does, and for a file that was cut short.
    """
    follows = {"model": model.fingerprint(), "data": data_sha256(rows), **scoring.follows}
    if store.has(scoring.kind, follows, TREE):
        done(len(rows))
        kept = store.read(scoring.kind, follows, HOST_TREE)
        place = None if model.mesh is None else shardings(scoring.kind, model.config, model.mesh)
        return Statistics(scoring.kind, jax.device_put(kept, place), len(rows))
    unfinished, in_batches = f"{scoring.kind}-unfinished", {**follows, "batch_size": scoring.batch_size}
    groups = batches_of(scoring, rows)
    start = _start(store, unfinished, in_batches)
    if start is not None:
        done(sum(len(group) for group in groups[: start[1]]))
    sums: Sums = {}
    for part in gather_parts(scoring, model.config, model.params, rows, model.mesh, start):
        if part.batches == len(groups):
            sums = part.sums
            store.write(scoring.kind, follows, sums, TREE)
            store.drop(unfinished, in_batches, TREE.suffix)
        elif part.batches % every == 0:
            store.write(unfinished, in_batches, {"batches": np.array([part.batches]), "sums": part.sums}, TREE)
        done(part.rows)
    return Statistics(scoring.kind, sums, len(rows))


def _start(store: Store, name: str, follows: Json) -> tuple[Sums, int] | None:
    """The sums of an interrupted pass, and of how many batches they are."""
    if not store.has(name, follows, TREE):
        return None
    kept = store.read(name, follows, HOST_TREE)
    return kept["sums"], int(kept["batches"][0])
