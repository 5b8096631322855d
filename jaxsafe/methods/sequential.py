"""Scoring and changing a model block by block, each block scored on the model as changed below it.

This is how Wanda prunes and how ActSVD was published (arXiv 2402.05162, appendix B): later blocks see what the
changes of earlier ones did. Block inputs are kept, so that all blocks cost two forward passes of one block each.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsafe.kernels.blocks import layer_of, range_of
from jaxsafe.kernels.forward import embed, run_block
from jaxsafe.kernels.importance import counted
from jaxsafe.kernels.sums import Scoring, Statistics, batches_of, gather, kind_of
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.taps import Reducer
from jaxsafe.model.transformer import Params
from jaxsafe.progress import Progress, silent
from jaxsafe.rows import Batch, Row, pad_rows

Change = Callable[..., Params]
"""(configuration of one layer, its weights, its statistics by each data set) -> its changed weights; every array keeps
a layer axis of length 1, so that scores, selection and rank removal apply as they do to a whole model."""


def change_blocks(
    scoring: Scoring,
    config: ModelConfig,
    params: Params,
    rows: Sequence[Row],
    change: Change,
    done: Progress = silent,
    beside: Sequence[Sequence[Row]] = (),
) -> dict[str, Any]:
    """`params` with `change` applied to block after block, each with the statistics that it has by then.

    `change` gets the statistics of `rows` and of each data set `beside`. Wanda and Gram sums are read from the kept
    inputs of the block. SNIP needs the gradient from above, so each block costs a pass forward and one back to it.
    `done` is called when a block is finished.
    """
    reducer = kind_of(scoring.kind).reducer
    data = (rows, *beside)
    batches = [[pad_rows([each[i] for i in group]) for group in batches_of(scoring, each)] for each in data]
    states, reducers = [list[jax.Array]() for _ in data], [list[Mapping[str, Reducer]]() for _ in data]
    if reducer is not None:
        taps = tuple(kind_of(scoring.kind).outline(config))
        states = [[embed(config, params, jnp.asarray(batch.tokens)) for batch in own] for own in batches]
        shares = [[jnp.asarray(counted(batch, scoring.positions), jnp.float32) for batch in own] for own in batches]
        reducers = [[dict.fromkeys(taps, reducer(share)) for share in own] for own in shares]
    for layer in range(config.layers):
        place = LayerRange(layer, layer + 1)
        found = []
        for each, own, inputs, reduce in zip(data, batches, states, reducers, strict=True):
            if reducer is None:
                sums = gather(dataclasses.replace(scoring, layers=place), config, params, each).sums
            else:
                sums = _block_sums(config, params, layer, inputs, own, reduce)
            found.append(Statistics(scoring.kind, sums, len(each)))
        one, view = range_of(config, params, place)
        new = change(one, view, *found)
        put = {
            name: stack.at[place.slice].set(new["layers"][name])
            if new["layers"][name] is not view["layers"][name]
            else stack
            for name, stack in params["layers"].items()
        }
        params = {**params, "layers": put}
        weights = layer_of(params, layer)
        states = [
            [
                run_block(config, weights, layer, x, jnp.asarray(batch.valid))[0]
                for x, batch in zip(inputs, own, strict=False)
            ]
            for inputs, own in zip(states, batches, strict=True)
        ]
        jax.block_until_ready((params, states))
        done(1)
    return dict(params)


def _block_sums(
    config: ModelConfig,
    params: Params,
    layer: int,
    states: Sequence[jax.Array],
    batches: Sequence[Batch],
    reducers: Sequence[Mapping[str, Reducer]],
) -> dict[str, jax.Array]:
    """{tap: [1, F] or [1, F, F]} over all batches, from the inputs of block `layer`."""
    weights, sums = layer_of(params, layer), None
    for x, batch, reduce in zip(states, batches, reducers, strict=True):
        _, read = run_block(config, weights, layer, x, jnp.asarray(batch.valid), tuple(reduce), reduce)
        sums = jax.block_until_ready(read if sums is None else jax.tree.map(jnp.add, sums, read))
    return jax.tree.map(lambda a: a[None], sums)
