"""Brittleness of a model whose layers go in turns: the edits of all layers at once, from less at a time."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import random_rows, tiny_chat_model, tiny_config, tiny_params

from configs.brittleness.base import base
from jaxsafe.io import sums as sums_module
from jaxsafe.io.store import Store
from jaxsafe.kernels.blocks import range_of, with_ranges
from jaxsafe.methods import brittleness as brittleness_module
from jaxsafe.methods.brittleness import DENSE, Material, Point, ScoreSettings, edited, mask_of, noise
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.weights import flatten, linear_maps, shardings
from jaxsafe.parallel import parse_mesh
from jaxsafe.records.run import plain
from launch.brittleness import details_of

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
SIDES = {
    "safety": random_rows([20, 31, 17, 25], behind=[5, 7, 3, 9]),
    "utility": random_rows([24, 30, 22, 41], behind=[14, 9, 12, 21], seed=1),
}
TURNS = ScoreSettings("wanda", layers_at_a_time=1)
MASKS = [Point("set_difference", (0.05, 0.02)), Point("top", (0.1,), 0, by="norm")]
RANKS = [Point("orthogonal", (30, 28)), Point("orthogonal", (30, 28), 0, by="norm")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return dataclasses.replace(tiny_chat_model(tmp_path_factory.mktemp("model")), params=PARAMS)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return Material(model, SIDES.get, Store(tmp_path_factory.mktemp("whole")), ScoreSettings("wanda"))


@pytest.fixture(scope="module")
def turns(model, tmp_path_factory):
    return Material(model, SIDES.get, Store(tmp_path_factory.mktemp("turns")), TURNS)


@pytest.mark.parametrize(
    "point",
    [MASKS[0], RANKS[0], *(pytest.param(point, marks=pytest.mark.slow) for point in (MASKS[1], RANKS[1]))],
    ids=lambda point: point.name,
)
def test_an_edit_in_turns_is_that_of_all_layers(whole, turns, point):
    (want, mask), (found, own_mask) = edited(whole, point), edited(turns, point)
    for path, value in flatten(want).items():
        np.testing.assert_allclose(flatten(found)[path], value, atol=1e-5, err_msg=path)
    if mask is not None:
        jax.tree.map(np.testing.assert_array_equal, own_mask, mask)
    assert noise(turns, point) == pytest.approx(noise(whole, point))


def test_what_a_run_says_of_its_points_is_that_of_all_layers(whole, turns):
    config, grid = base(), [DENSE, MASKS[0], RANKS[0]]
    config.similarity_rank = 4
    want, found = (plain(details_of(config, material, grid)) for material in (whole, turns))
    assert (found["overlap"], found["sparsity"]) == (want["overlap"], want["sparsity"])
    for name, values in want["similarity"]["values"].items():
        assert found["similarity"]["values"][name] == pytest.approx(values, abs=1e-5)
    for name, values in want["energy"]["safety"].items():
        assert found["energy"]["safety"][name] == pytest.approx(values, abs=1e-5)


@pytest.mark.slow
def test_a_mask_in_turns_on_a_mesh_is_that_of_one_device(model, whole, tmp_path):
    mesh = parse_mesh("data:4,model:2")
    spread = dataclasses.replace(model, params=jax.device_put(PARAMS, shardings(CONFIG, mesh)), mesh=mesh)
    for _ in range(2):  # made, then read
        material = Material(spread, SIDES.get, Store(tmp_path), TURNS)
        jax.tree.map(np.testing.assert_array_equal, mask_of(material, MASKS[0]), mask_of(whole, MASKS[0]))
    basis = next(material.parts()).bases("safety")["layers"]["down"]
    assert {shard.data.size for shard in basis.vectors.addressable_shards} == {basis.vectors.size // 8}
    again = next(Material(spread, SIDES.get, Store(tmp_path), TURNS).parts()).bases("safety")["layers"]["down"]
    assert again.vectors.sharding == basis.vectors.sharding and (again.vectors == basis.vectors).all()


def test_a_range_that_is_finished_is_not_made_again(model, tmp_path, monkeypatch):
    material, made = Material(model, SIDES.get, Store(tmp_path), TURNS), []
    gather_parts = sums_module.gather_parts

    def counted(scoring, *rest):
        made.append(str(scoring.layers))
        return gather_parts(scoring, *rest)

    monkeypatch.setattr(sums_module, "gather_parts", counted)
    first = next(material.parts())
    first.scores("safety"), first.bases("safety")
    assert made == ["0", "0"]
    made.clear()
    resumed = Material(model, SIDES.get, Store(tmp_path), TURNS)
    for part in resumed.parts():
        part.scores("safety"), part.bases("safety")
    assert made == ["1", "1", "2", "2"]
    monkeypatch.setattr(brittleness_module, "act_svd", None)
    assert all(part.bases("safety") for part in Material(model, SIDES.get, Store(tmp_path), TURNS).parts())


def test_the_last_range_may_be_shorter(model, tmp_path):
    material = Material(model, SIDES.get, Store(tmp_path), dataclasses.replace(TURNS, layers_at_a_time=2))
    assert [(str(part.layers), part.config.layers) for part in material.parts()] == [("0 to 1", 2), ("2", 1)]
    assert [len(part.params["layers"]["q"]) for part in material.parts()] == [2, 1]


def test_of_what_is_edited_there_is_one_copy():
    maps = sum(flatten(PARAMS)[path].nbytes for path in linear_maps(CONFIG))
    live = []

    def held():
        return sum(array.nbytes for array in jax.live_arrays())

    def changed():
        for layer in range(CONFIG.layers):
            layers = LayerRange(layer, layer + 1)
            few = jax.block_until_ready(range_of(CONFIG, PARAMS, layers)[1])
            live.append(held())
            yield layers, few

    before = held()
    same = with_ranges(CONFIG, PARAMS, changed())
    jax.tree.map(np.testing.assert_array_equal, same, PARAMS)
    share = sum(stack[:1].nbytes for stack in PARAMS["layers"].values())
    assert max(live) - before <= maps + 2 * share  # the range that is written, and the next one


def test_weights_of_all_layers_are_not_compared_in_turns(turns):
    with pytest.raises(ValueError, match="per 'model' compares the weights of all layers; give no layers_at_a_time"):
        ScoreSettings(per="model", layers_at_a_time=2)
    with pytest.raises(ValueError, match="per 'model' compares the weights of all layers"):
        mask_of(turns, Point("top", (0.1,), per="model"))
