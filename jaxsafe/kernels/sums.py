"""Sums over a data set that scores and bases are made from: one pass, batch by batch, on any number of devices.

B batch, T position, L layers, I inputs and O outputs of a linear map, F features of a tap
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsafe.kernels.forward import joined_tokens
from jaxsafe.kernels.importance import (
    LOSSES,
    POSITIONS,
    Counting,
    add_products,
    gram_reducers,
    gram_spec,
    gram_sums,
    gram_widths,
    inputs_and_output_gradients,
    matrix_spec,
    no_sums,
    snip_scores,
    wanda_reducers,
    wanda_scores,
    wanda_sums,
)
from jaxsafe.kernels.layer_sums import LayerSums, add_reduced, add_snip
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.taps import Gram, Reducer, SquareSum
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import linear_maps, nest, partition_spec, sizes
from jaxsafe.parallel import put_rows
from jaxsafe.progress import Progress, silent
from jaxsafe.rows import Batch, Row, bucket, check_context, group_by_length, pad_rows, row_bucket

Sums = Mapping[str, Any]
"""A tree of float32 sums: of the linear maps {"layers": {"q": [L, *I, *O], ...}}, or by tap {tap: [L, F, ...]}."""


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How sums are made: of which `kind`, over which tokens, by which loss of a row, and from how many rows at a time.

    positions: "response", "prompt" or "all"; loss, of "snip" alone: "mean" or "sum" over a row's counted tokens;
    layers: those that are summed, None for all.
    Raises ValueError for an unknown name and a batch_size that is not positive.
    """

    kind: str = "snip"
    positions: str = "response"
    loss: str = "mean"
    batch_size: int = 8
    layers: LayerRange | None = None

    def __post_init__(self) -> None:
        kind_of(self.kind)
        for name, known in (("positions", POSITIONS), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known; use one of {', '.join(known)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} is not positive")

    @property
    def counting(self) -> Counting:
        """Which tokens count, and how."""
        return Counting(self.positions, self.loss)

    @property
    def follows(self) -> dict[str, Any]:
        """What whole sums follow from besides the model and the data, in values of JSON."""
        kind = kind_of(self.kind)
        loss = {"loss": self.loss} if kind.of_loss else {}
        side = {"side": "narrower"} if kind.narrow else {}
        layers = {"layers": [self.layers.first, self.layers.stop]} if self.layers else {}
        return {"kind": self.kind, "positions": self.positions, **loss, **side, **layers}

    def summed(self, config: ModelConfig) -> ModelConfig:
        """`config` with as many layers as are summed. Raises ValueError for layers that a model does not have."""
        layers = self.layers and self.layers.within(config.layers)
        return config if layers is None else dataclasses.replace(config, layers=len(layers))


Add = Callable[[Scoring, ModelConfig, Params, Batch, Sums, int | None, Mesh | None], Sums]
Reducers = Callable[[ModelConfig, Batch, str, int | None, Mesh | None], Mapping[str, Reducer]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of sums: everything in which kinds differ.

    outline: the tree as `jax.ShapeDtypeStruct`s
    specs: how each leaf of it lies on a mesh
    add: what `add_batch` does
    reducers: (config, batch, positions, last, mesh) -> {tap: what makes the sums of a block from a batch}; None where
        they need gradients
    scores: (config, params, sums, n) -> a score of every weight, None where there is none
    reducer: makes the sums of one block from its inputs, weighted [B, T]; None where they need the whole model
    of_loss: whether they follow from a loss
    narrow: whether outputs of a map stand for its inputs where they are fewer
    """

    outline: Callable[[ModelConfig], Sums]
    specs: Callable[[ModelConfig, Mesh], Sums]
    add: Add
    reducers: Reducers | None = None
    scores: Callable[[ModelConfig, Params, Sums, int], dict[str, Any]] | None = None
    reducer: Callable[[Any], Reducer] | None = None
    of_loss: bool = False
    narrow: bool = False


def _of_maps(config: ModelConfig) -> Sums:
    return jax.eval_shape(lambda: no_sums(config))


def _as_maps(config: ModelConfig, mesh: Mesh) -> Sums:
    return nest({path: partition_spec(config, w, mesh) for path, w in linear_maps(config).items()})


def _of_inputs(config: ModelConfig) -> Sums:
    """{tap: [L, I]}"""
    width = {str(w.tap): math.prod(sizes(config, w.inputs)) for w in linear_maps(config).values()}
    return {tap: jax.ShapeDtypeStruct((config.layers, n), jnp.float32) for tap, n in width.items()}


def _as_inputs(config: ModelConfig, mesh: Mesh) -> Sums:
    """As the inputs of the maps."""
    maps = linear_maps(config).values()
    return {str(w.tap): PartitionSpec(None, matrix_spec(config, w, mesh)[0]) for w in maps}


def _of_narrow_sides(config: ModelConfig) -> Sums:
    """{tap: [L, F, F]}"""
    return {tap: jax.ShapeDtypeStruct((config.layers, F, F), jnp.float32) for tap, F in gram_widths(config).items()}


def _by_both_sides(config: ModelConfig, mesh: Mesh) -> Sums:
    return {tap: PartitionSpec(None, *gram_spec(F, mesh)) for tap, F in gram_widths(config).items()}


def _add_snip(
    scoring: Scoring, config: ModelConfig, params: Params, batch: Batch, sums: Sums, last: int | None, mesh: Mesh | None
) -> Sums:
    inputs, gradients = inputs_and_output_gradients(config, params, batch, scoring.counting, last, mesh)
    return add_products(config, inputs, gradients, sums, mesh)


def _add_wanda(
    scoring: Scoring, config: ModelConfig, params: Params, batch: Batch, sums: Sums, last: int | None, mesh: Mesh | None
) -> Sums:
    return jax.tree.map(jnp.add, sums, wanda_sums(config, params, batch, scoring.positions, mesh=mesh))


def _add_gram(
    scoring: Scoring, config: ModelConfig, params: Params, batch: Batch, sums: Sums, last: int | None, mesh: Mesh | None
) -> Sums:
    return jax.tree.map(jnp.add, sums, gram_sums(config, params, batch, scoring.positions, last, mesh=mesh))


def _wanda_reducers(
    config: ModelConfig, batch: Batch, positions: str, last: int | None, mesh: Mesh | None
) -> Mapping[str, Reducer]:
    return wanda_reducers(config, batch, positions)  # of all slots, and of features where they lie


KINDS: Mapping[str, Kind] = {
    "snip": Kind(_of_maps, _as_maps, _add_snip, scores=snip_scores, of_loss=True),
    "wanda": Kind(_of_inputs, _as_inputs, _add_wanda, _wanda_reducers, wanda_scores, SquareSum),
    "gram": Kind(_of_narrow_sides, _by_both_sides, _add_gram, gram_reducers, reducer=Gram, narrow=True),
}
"""SNIP sums |gradients| of the maps, Wanda squares of their inputs, Gram outer products of their narrower side."""


def kind_of(name: str) -> Kind:
    """The kind of this name. Raises ValueError for an unknown one."""
    if name not in KINDS:
        raise ValueError(f"statistics {name!r} are not known; use one of {', '.join(KINDS)}")
    return KINDS[name]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over `n` samples of one `kind`: "snip" (tree of the maps), "wanda" and "gram" (by tap). Float32."""

    kind: str
    sums: Sums
    n: int

    def scores(self, config: ModelConfig, params: Params) -> dict[str, Any]:
        """The score of every weight of the linear maps, float32 (higher: matters more).

        Of sums of some layers `config` and `params` are those of these layers (see `blocks.range_of`).
        Raises ValueError for a kind that scores no weights, and for sums of no samples.
        """
        make = kind_of(self.kind).scores
        if make is None:
            raise ValueError(f"statistics of kind {self.kind!r} score no weights; those of snip and wanda do")
        return make(config, params, self.sums, self.n)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of both data sets together. Raises ValueError for different kinds."""
    if a.kind != b.kind:
        raise ValueError(f"statistics of kind {a.kind!r} and {b.kind!r} cannot be merged")
    return Statistics(a.kind, jax.tree.map(jnp.add, a.sums, b.sums), a.n + b.n)


def shardings(kind: str, config: ModelConfig, mesh: Mesh) -> Any:
    """How the sums of `kind` lie on `mesh`, split over both of its axes. Raises ValueError for an unknown kind."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), kind_of(kind).specs(config, mesh))


def nothing(kind: str, config: ModelConfig, mesh: Mesh | None = None) -> Any:
    """The sums of no samples. Raises ValueError for an unknown kind."""

    def zeros() -> Sums:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), kind_of(kind).outline(config))

    return zeros() if mesh is None else jax.jit(zeros, out_shardings=shardings(kind, config, mesh))()


@functools.partial(jax.jit, static_argnames=("scoring", "config", "last", "mesh"), donate_argnames=("sums",))
def add_batch(
    scoring: Scoring,
    config: ModelConfig,
    params: Params,
    batch: Batch,
    sums: Sums,
    last: int | None,
    mesh: Mesh | None,
) -> Any:
    """`sums` with those of `batch` added; on a mesh they lie as `shardings` says, and rows are split over `data`.

    `last` is a number of final slots that holds every counted token, None for all slots.
    """
    added = kind_of(scoring.kind).add(scoring, config, params, batch, sums, last, mesh)
    return added if mesh is None else jax.lax.with_sharding_constraint(added, shardings(scoring.kind, config, mesh))


def with_batch_of_layers(
    scoring: Scoring,
    config: ModelConfig,
    params: Params,
    batch: Batch,
    sums: LayerSums,
    last: int | None,
    mesh: Mesh | None,
) -> LayerSums:
    """As `add_batch`, of some layers: `sums` with those of `batch` added."""
    reducers = kind_of(scoring.kind).reducers
    if reducers is None:
        added = add_snip(config, params, batch, sums, scoring.counting, last, mesh)
    else:
        added = add_reduced(config, params, batch, reducers(config, batch, scoring.positions, last, mesh), sums, mesh)
    if mesh is None:
        return added
    where = shardings(scoring.kind, config, mesh)
    return LayerSums(added.first, jax.lax.with_sharding_constraint(added.sums, where))


add_batch_of_layers = jax.jit(
    with_batch_of_layers, static_argnames=("scoring", "config", "last", "mesh"), donate_argnames=("sums",)
)
"""`with_batch_of_layers` as a program, one for all ranges of so many layers."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A pass after its first `batches` batches, the last of which had so many `rows`.

    sums: those so far; to be read before the next batch is added, which takes their memory.
    """

    batches: int
    rows: int
    sums: Sums


def batches_of(scoring: Scoring, rows: Sequence[Row]) -> list[Any]:
    """Indices of the rows of each batch of a pass over `rows`."""
    return group_by_length([len(row.ids) for row in rows], scoring.batch_size)


def gather_parts(
    scoring: Scoring,
    config: ModelConfig,
    params: Params,
    rows: Sequence[Row],
    mesh: Mesh | None = None,
    start: tuple[Sums, int] | None = None,
) -> Iterator[Part]:
    """One pass over `rows` (prompts with their answers), batch by batch, formed by length.

    On a mesh every device runs its own rows and holds its own share of the sums of all rows. `start` are the sums of
    the first so many batches, from an interrupted pass. Raises ValueError for no rows, rows without a
    counted token, rows longer than the context, layers that the model does not have, and a batch that does not fit
    memory.
    """
    _check_rows(scoring, config, rows)
    multiple, summed = 1 if mesh is None else mesh.shape["data"], scoring.summed(config)
    sums, first = (nothing(scoring.kind, summed, mesh), 0) if start is None else start
    if start is not None and mesh is not None:
        sums = jax.device_put(sums, shardings(scoring.kind, config, mesh))
    shared = joined(scoring, rows, mesh)
    lengths = slots_by_bucket(rows, shared) if shared else {}
    for number, group in enumerate(batches_of(scoring, rows)[first:], first + 1):
        count = row_bucket(len(group), scoring.batch_size, multiple)
        length = lengths.get(bucket(len(rows[group[0]].ids)))
        batch = pad_rows([rows[i] for i in group], length, count, shared=shared)
        answers = batch.tokens.shape[1] - 1 - int(batch.instruction_end.min())
        last = min(bucket(answers), batch.tokens.shape[1] - shared) if scoring.positions == "response" else None
        try:
            # Waited for, so that a batch is finished, and one that does not fit memory is met, before the next one.
            sums = jax.block_until_ready(_added(scoring, config, params, put_rows(batch, mesh), sums, last, mesh))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(
                f"{len(group)} rows do not fit memory; give a batch_size below {scoring.batch_size}"
            ) from None
        yield Part(number, len(group), sums)


def joined(scoring: Scoring, rows: Sequence[Row], mesh: Mesh | None) -> int:
    """How many first tokens of all rows are run once for a batch.

    None on a mesh, where these tokens count, where a row's own gradient is wanted, or where blocks are run one by one.
    """
    alone = mesh is None and scoring.layers is None and scoring.positions == "response"
    return joined_tokens(rows, mesh) if alone and kind_of(scoring.kind).reducers is not None else 0


def slots_by_bucket(rows: Sequence[Row], shared: int) -> dict[int, int]:
    """{bucket of a row's length: slots of batches of such rows}: `shared` ones, and a multiple of eight behind them."""
    longest = dict[int, int]()
    for row in rows:
        own = bucket(len(row.ids))
        longest[own] = max(longest.get(own, 0), len(row.ids))
    return {own: shared + -(-(n - shared) // 8) * 8 for own, n in longest.items()}


def _added(
    scoring: Scoring, config: ModelConfig, params: Params, batch: Batch, sums: Sums, last: int | None, mesh: Mesh | None
) -> Sums:
    if scoring.layers is None:
        return add_batch(scoring, config, params, batch, sums, last, mesh)
    of_any, some = dataclasses.replace(scoring, layers=None), LayerSums(scoring.layers.first, sums)
    return add_batch_of_layers(of_any, config, params, batch, some, last, mesh).sums


def gather(
    scoring: Scoring,
    config: ModelConfig,
    params: Params,
    rows: Sequence[Row],
    mesh: Mesh | None = None,
    done: Progress = silent,
) -> Statistics:
    """The statistics of `rows` (prompts with their answers), in one pass of `gather_parts`; errors as there.

    `done` is called with the number of rows of each finished batch.
    """
    part = None
    for part in gather_parts(scoring, config, params, rows, mesh):
        done(part.rows)
    assert part is not None, "a pass over rows has a batch"
    return Statistics(scoring.kind, part.sums, len(rows))


def _check_rows(scoring: Scoring, config: ModelConfig, rows: Sequence[Row]) -> None:
    if not rows:
        raise ValueError("there are no rows to score; give at least one prompt with its answer")
    check_context(rows, config.context)
    if scoring.positions != "response":
        return
    for i, row in enumerate(rows):
        if row.instruction_end + 1 >= len(row.ids):
            raise ValueError(f"row {i} has no answer; positions='response' needs at least one answer token a row")
