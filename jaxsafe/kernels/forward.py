"""Forward passes over a batch of texts: its final states, its activations, and one block at a time.

Tokens that all rows begin with, such as a system prompt, are run once for all of them.

Axes: B batch, T slots of the texts, S slots of a cache, R slots that are run, P tokens that all rows begin with,
J = P + B R tokens of a joined row, L layers, K kv_heads, H head_dim, D embed, F features at a tap
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxsafe.kernels.blocks import Blocks
from jaxsafe.model.attention import DENSE, Slots
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.joined import JoinedSlots, apart, held_tokens, joined
from jaxsafe.model.taps import FINAL, Reducer, at, collection, readings
from jaxsafe.model.transformer import Cache, Edits, Params, Transformer, embedded, variables
from jaxsafe.rows import Batch, Row, shared_tokens

Given = tuple[Int[Array, "B R"], Slots | JoinedSlots, Cache | None]
"""What `Transformer` is given: tokens, where they are, and a cache that holds what precedes them."""


def prompt_inputs(
    config: ModelConfig, params: Params, batch: Batch, slots: int = 0, edits: Edits = None, alike: bool = False
) -> Given:
    """What `Transformer` is given to run the prompts.

    Where `batch.shared` is P > 0 these are the T - P last slots, behind a cache of T + `slots` slots that holds the
    first P tokens of every row; a shorter row's slots among them hold some of these tokens again. The numbers are
    those of the whole prompts. Where there are `edits` nothing is shared, unless they are `alike` in rows and slots.
    """
    T, P = batch.tokens.shape[1], batch.shared
    if (edits and not alike) or not P:
        return batch.tokens, Slots(batch.valid), None
    held = Slots(jnp.pad(batch.valid, [(0, 0), (0, slots)]), P)
    return batch.tokens[:, P:], held, _shared_cache(config, params, batch, T + slots, edits)


def _shared_cache(config: ModelConfig, params: Params, batch: Batch, slots: int, edits: Edits) -> Cache:
    """A cache of `slots` slots whose first P hold what of the shared tokens falls among them, by row."""
    P = batch.shared
    slots_once = Slots(jnp.ones((1, P), bool))
    _, once = Transformer(config).apply(variables(params, edits), _shared_tokens(batch), slots_once, last=0)
    source = held_tokens(jnp.asarray(batch.valid), P)

    def spread(a: Float[Array, "L 1 K P H"]) -> Float[Array, "L B K P H"]:
        return jnp.moveaxis(a[:, 0][:, :, source], 2, 1)

    return extended(jax.tree.map(spread, once), slots)


def _shared_tokens(batch: Batch) -> Int[Array, "1 P"]:
    """The tokens that all rows begin with."""
    first = batch.tokens.shape[1] - jnp.asarray(batch.valid[0]).sum()
    return jax.lax.dynamic_slice_in_dim(batch.tokens[0], first, batch.shared)[None]


def shared_states(config: ModelConfig, params: Params, batch: Batch, edits: Edits = None) -> Float[Array, "L P D"]:
    """The residual stream behind every block of the tokens that all rows begin with."""
    valid = jnp.ones((1, batch.shared), bool)
    return capture(config, params, _shared_tokens(batch), valid, edits=edits)["resid"][:, 0]


def extended(cache: Cache, slots: int) -> Cache:
    """`cache` with empty slots behind, `slots` in all, in the dtype in which it is written fastest."""

    def longer(a: Float[Array, "L B K P H"]) -> Float[Array, "L B K S H"]:
        return jnp.pad(a.astype(cache_dtype(a.dtype)), [(0, 0)] * 3 + [(0, slots - a.shape[3]), (0, 0)])

    return jax.tree.map(longer, cache)


def cache_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that holds keys and values of `dtype` while slots are written.

    On CPUs jax 0.10 writes one slot of a half-precision cache by converting all of it to float32 and back.
    """
    slow = jax.default_backend() == "cpu" and jax.__version_info__ < (0, 11)
    return jnp.dtype(jnp.float32) if slow else dtype


def final_states(
    config: ModelConfig, params: Params, given: Given, edits: Edits = None, keeps: str = "products"
) -> Float[Array, "B R D"]:
    """The normed states that the unembedding reads, of the slots that are run.

    A backward pass keeps of every layer what `keeps` (static) says (see `KEEPS` of the transformer).
    """
    options: dict[str, Any] = {"last": 0, "capture_intermediates": at(FINAL), "mutable": ["intermediates"]}
    _, state = Transformer(config, keeps).apply(variables(params, edits), *given, **options)
    return readings(state["intermediates"])[FINAL]


def joined_states(config: ModelConfig, params: Params, batch: Batch, keeps: str = "products") -> Float[Array, "B R D"]:
    """The normed states of the T - P slots behind the P = `batch.shared` tokens that all rows begin with.

    The numbers and `keeps` are those of `final_states`. Everything is run in one pass without a cache, which a backward
    pass would keep for every layer. For one device: rows of a joined row do not lie apart on a mesh.
    """
    if not batch.shared:
        return final_states(config, params, prompt_inputs(config, params, batch), keeps=keeps)
    return apart(final_states(config, params, joined_inputs(batch), keeps=keeps), len(batch.tokens), batch.shared)


def joined_tokens(rows: Sequence[Row], mesh: Mesh | None) -> int:
    """How many first tokens, those that all `rows` begin with, are run once where batches of them become one row.

    None where rows lie on several devices, nor where they are so long that an accelerator's own kernel of attention,
    which knows whole rows only, is worth more.
    """
    split = mesh is not None and mesh.shape["data"] > 1
    long = max(len(row.ids) for row in rows) ** 2 > DENSE
    return 0 if split or long else shared_tokens(rows)


def joined_inputs(batch: Batch) -> Given:
    """What `Transformer` is given to run a batch as one row (see `model/joined.py`)."""
    P = batch.shared
    tokens = joined(_shared_tokens(batch), batch.tokens[:, P:])
    return tokens, JoinedSlots(jnp.asarray(batch.valid), P), None


@flax.struct.dataclass
class Apart:
    """A reducer of what passes B = `rows` rows that are run as one; `of` reduces [B, R, F] behind `shared` ones."""

    of: Any
    rows: int = flax.struct.field(pytree_node=False)
    shared: int = flax.struct.field(pytree_node=False)

    def __call__(self, x: Float[Array, "1 J F"]) -> Float[Array, "..."]:
        return self.of(apart(x, self.rows, self.shared))


def capture(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    taps: Sequence[str] = ("resid",),
    edits: Edits = None,
    reduce: Mapping[str, Reducer] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """{tap: activations} of left-padded `tokens`, of which `valid` are no padding.

    A tap inside the blocks gives [L, B, T, F], "embed" and "final" give [B, T, D]. A reducer for a tap, such as
    `At(slots)` or `SquareSum(weight)`, is applied inside the scan over layers, so that only what it
    returns is ever stacked. Pure and jittable (`config` and `taps` static). Raises ValueError for an
    unknown tap.
    """
    return captured(config, params, (tokens, Slots(valid), None), taps, edits, reduce)


def captured(
    config: ModelConfig,
    params: Params,
    given: Given,
    taps: Sequence[str],
    edits: Edits = None,
    reduce: Mapping[str, Reducer] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """What `capture` returns, of what the model is `given`."""
    collections = variables(params, edits) | {"reducers": collection(reduce, "reduce")}
    options: dict[str, Any] = {"last": 0, "capture_intermediates": at(*taps), "mutable": ["intermediates"]}
    _, state = Transformer(config).apply(collections, *given, **options)
    return readings(state["intermediates"])


@functools.partial(jax.jit, static_argnames=("config", "taps"))
def run_block(
    config: ModelConfig,
    weights: Params,
    layer: int | Int[Array, ""],
    x: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
    taps: tuple[str, ...] = (),
    reduce: Mapping[str, Reducer] | None = None,
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "..."]]]:
    """The residual stream after the block of number `layer` and `weights` (no layer axis), and what its taps read.

    `valid` as in `capture`. One compilation serves every layer.
    """
    reducers = collection(reduce, "reduce").get("layers", {})
    return Blocks.of(config, valid).run(weights, layer, x, taps, reducers=reducers)


def embed(config: ModelConfig, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """What enters the first block."""
    return embedded(config, params["embed"], tokens)
