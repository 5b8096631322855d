"""Sums of some layers against those of all, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from tiny import random_rows, tiny_config, tiny_params

from jaxsafe.kernels.sums import Scoring, gather
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.weights import flatten, shardings
from jaxsafe.parallel import parse_mesh

# Layers that differ in what they see and in their rotation.
CONFIG = tiny_config(window=9, sliding=(True, False, True), turned=(True, True, False), qkv_bias=True)
PARAMS = tiny_params(CONFIG)
ROWS = random_rows([33, 41, 37, 45, 48, 34, 43, 39], behind=[5, 7, 3, 9, 11, 4, 6, 2])
RANGES = [LayerRange(0, 2), LayerRange(1, 3)]


def placed(mesh):
    return PARAMS if mesh is None else jax.device_put(PARAMS, shardings(CONFIG, mesh))


@pytest.mark.parametrize(("kind", "mesh"), [("snip", ""), ("gram", ""), ("snip", "4x2"), ("gram", "4x2")])
def test_sums_of_a_range_are_those_of_all_layers(kind, mesh):
    mesh = parse_mesh("data:4,model:2") if mesh else None
    whole = flatten(jax.device_get(gather(Scoring(kind), CONFIG, PARAMS, ROWS).sums))
    parts = [gather(Scoring(kind, layers=each), CONFIG, placed(mesh), ROWS, mesh).sums for each in RANGES]
    for layers, part in zip(RANGES, map(flatten, parts), strict=True):
        for path, value in part.items():
            scale = np.abs(whole[path]).max()
            want = whole[path][layers.slice] / scale
            np.testing.assert_allclose(np.asarray(value) / scale, want, atol=2e-5, err_msg=path)
            shares = {shard.data.size for shard in value.addressable_shards}
            assert shares == {value.size // (1 if mesh is None else 8)}, path


def test_ranges_of_one_length_share_a_program_and_blocks_behind_are_not_run():
    gather(Scoring("gram", layers=RANGES[0]), CONFIG, PARAMS, ROWS)
    layers = {name: stack.at[2].set(jnp.nan) for name, stack in PARAMS["layers"].items()}
    made = compilations()
    gather(Scoring("gram", layers=RANGES[1]), CONFIG, PARAMS, ROWS)
    broken = gather(Scoring("gram", layers=RANGES[0]), CONFIG, {**PARAMS, "layers": layers}, ROWS)
    assert not made
    assert all(np.isfinite(value).all() for value in broken.sums.values())


def test_layers_that_a_model_lacks_are_refused():
    with pytest.raises(ValueError, match="layers 1 to 3 are no range of this model"):
        gather(Scoring("wanda", layers=LayerRange(1, 4)), CONFIG, PARAMS, ROWS)
