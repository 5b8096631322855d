"""Scoring and changing a model block by block, each block scored on the model as changed below it.

This is how Wanda prunes and how ActSVD was published (arXiv 2402.05162, appendix B): later blocks see what the
changes of earlier ones did. Block inputs are kept, so that all blocks cost two forward passes of one block each.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsafe.kernels.blocks import embed, layer_of, run_block
from jaxsafe.kernels.importance import counted, input_taps
from jaxsafe.methods.statistics import Statistics, gather
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.taps import Gram, Reducer, SquareSum
from jaxsafe.model.transformer import Params
from jaxsafe.text.batches import Batch, Row, group_by_length, pad_rows

Change = Callable[[ModelConfig, Params, Statistics], Params]
"""(configuration of one layer, its weights, its statistics) -> its changed weights; every array keeps a layer axis
of length 1, so that scores, selection and rank removal apply as they do to a whole model."""


def change_blocks(
    kind: str,
    config: ModelConfig,
    params: Params,
    rows: Sequence[Row],
    change: Change,
    batch_size: int = 8,
    positions: str = "response",
    loss: str = "mean",
    done: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """`params` with `change` applied to block after block, each with the `kind` of statistics it has by then.

    "wanda" and "gram" are read from the kept inputs of the block. "snip" needs the gradient from above, so each
    block costs a pass of the whole model. `done` hears of finished blocks.
    """
    one = dataclasses.replace(config, layers=1)
    batches = [pad_rows([rows[i] for i in g]) for g in group_by_length([len(r.ids) for r in rows], batch_size)]
    states = [] if kind == "snip" else [embed(params, jnp.asarray(batch.tokens)) for batch in batches]
    for layer in range(config.layers):
        if kind == "snip":
            whole = gather(kind, config, params, rows, batch_size, positions, loss)
            sums = jax.tree.map(lambda a, layer=layer: a[layer : layer + 1], whole.sums)
        else:
            sums = _block_sums(kind, config, params, layer, states, batches, positions)
        slot = slice(layer, layer + 1)
        view = {"layers": jax.tree.map(lambda a, slot=slot: a[slot], dict(params["layers"]))}
        new = change(one, view, Statistics(kind, sums, len(rows)))
        put = {
            name: stack.at[slot].set(new["layers"][name]) if new["layers"][name] is not view["layers"][name] else stack
            for name, stack in params["layers"].items()
        }
        params = {**params, "layers": put}
        weights = layer_of(params, layer)
        states = [
            run_block(config, weights, x, jnp.asarray(batch.valid))[0]
            for x, batch in zip(states, batches, strict=False)
        ]
        done(1)
    return dict(params)


def _block_sums(
    kind: str,
    config: ModelConfig,
    params: Params,
    layer: int,
    states: Sequence[jax.Array],
    batches: Sequence[Batch],
    positions: str,
) -> dict[str, jax.Array]:
    """{tap: [1, F] or [1, F, F]} over all batches, from the inputs of one block."""
    taps, weights, sums = input_taps(config), layer_of(params, layer), None
    reducers: dict[str, Callable[[Any], Reducer]] = {"wanda": SquareSum, "gram": Gram}
    for x, batch in zip(states, batches, strict=True):
        weight = jnp.asarray(counted(batch, positions), jnp.float32)
        _, read = run_block(
            config, weights, x, jnp.asarray(batch.valid), taps, dict.fromkeys(taps, reducers[kind](weight))
        )
        sums = read if sums is None else jax.tree.map(jnp.add, sums, read)
    return jax.tree.map(lambda a: a[None], sums)
