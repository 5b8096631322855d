"""Defences and their controls, and rewinds against slow references."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import random_rows, tiny_chat_model, tiny_config, tiny_params

from jaxsafe.io.store import Store
from jaxsafe.kernels.lora import LoRA
from jaxsafe.kernels.units import unit_mask
from jaxsafe.methods.anatomy import UnitSettings, unit_roles_once
from jaxsafe.methods.brittleness import Material
from jaxsafe.methods.defences import NONE, Keep, defences, leading, region
from jaxsafe.methods.ssah import Role, kept_units, random_units, unit_scores, units_of
from jaxsafe.methods.trainer import FineTuning, train, trained
from jaxsafe.model.weights import flatten, linear_maps

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
TUNED = tiny_params(CONFIG, seed=1)
SIDES = {
    "safety": random_rows([20, 31, 17, 25], behind=[5, 7, 3, 9]),
    "utility": random_rows([24, 30, 22, 41], behind=[14, 9, 12, 21], seed=1),
}
ROWS = random_rows([14, 16, 13, 15, 16, 14], behind=[4, 7, 3, 5, 2, 6])
OUTPUTS = {"q": 32, "k": 16, "v": 16, "o": 32, "gate": 48, "up": 48, "down": 32}
WEIGHTS, RANKS, LAYERS = Keep("weights", (0.3, 0.1)), Keep("ranks", (8,)), Keep("layers", (1, 2))
UNITS = Keep("units", (0.2,))
REGIONS = [Keep(d.part, d.values, random) for d in (WEIGHTS, RANKS, LAYERS) for random in (False, True)]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    model = tiny_chat_model(tmp_path_factory.mktemp("model"))
    return Material(model, SIDES.get, Store(tmp_path_factory.mktemp("store")))


def bits(a):
    return np.asarray(a).view(np.uint32)


# The grid


def test_a_grid_of_defences_begins_with_none():
    grid = defences({"weights": ((0.1, 0.2),), "ranks": (4,), "layers": ((0, 2),)}, controls=True, rewinds=True)
    assert grid[0] == NONE and len(grid) == len({d.name for d in grid}) == 1 + 3 * 4
    assert [d.name for d in grid[:5]] == [
        "none",
        "freeze weights q=0.1 p=0.2",
        "freeze random weights q=0.1 p=0.2",
        "rewind weights q=0.1 p=0.2",
        "rewind random weights q=0.1 p=0.2",
    ]
    assert [d.name for d in defences({"ranks": (4,)}, controls=False, rewinds=False)] == ["none", "freeze ranks k=4"]
    for wrong, said in [
        (("heads", (1,)), "part 'heads'"),
        (("weights", (0.1,)), r"takes \('q', 'p'\); got \(0.1,\)"),
    ]:
        with pytest.raises(ValueError, match=said):
            Keep(*wrong)


# Regions


def test_no_utility_leaves_the_top_of_safety(material):
    """(q, 0) keeps exactly q of every matrix, those of the highest safety scores."""
    for q in (0.1, 0.3, 0.7):
        kept = flatten(region(material, Keep("weights", (q, 0.0)), 0).mask)
        scores = flatten(material.scores("safety"))
        for path in linear_maps(CONFIG):
            for mask, score in zip(np.asarray(kept[path]), np.asarray(scores[path]), strict=True):
                assert mask.sum() == int(q * mask.size)
                assert score[mask].min() >= score[~mask].max()


def test_a_control_keeps_as_much_elsewhere(material):
    for original, control in zip(REGIONS[::2], REGIONS[1::2], strict=True):
        ours, random, other = (region(material, d, s) for d, s in ((original, 0), (control, 0), (control, 5)))
        assert 0 < ours.share < 1 and random.share == pytest.approx(ours.share)
        for path in linear_maps(CONFIG):
            a, b, c = (
                np.asarray(flatten(r.mask if r.mask is not None else r.bases)[path]) for r in (ours, random, other)
            )
            assert a.shape == b.shape
            if original.part == "weights":
                np.testing.assert_array_equal(a.reshape(3, -1).sum(1), b.reshape(3, -1).sum(1))
                assert (a != b).any() and (b != c).any()
            elif original.part == "ranks":
                np.testing.assert_allclose(
                    np.swapaxes(b, 1, 2) @ b, np.broadcast_to(np.eye(b.shape[2]), (3, *[b.shape[2]] * 2)), atol=1e-4
                )
                assert np.abs(a - b).max() > 0.05 and np.abs(b - c).max() > 0.05
            else:
                kept = [np.flatnonzero(m.reshape(3, -1).all(1)) for m in (a, b)]
                assert len(kept[0]) == len(kept[1]) == 1 and kept[0] != kept[1]
        assert original.control == control and control.control is None
        # Its share is known without the region.
        assert original.share(material) == control.share(material) == pytest.approx(ours.share, rel=1e-12)
    assert NONE.share(material) == 0 and NONE.control is None
    with pytest.raises(ValueError, match="whole model"):
        region(material, Keep("layers", (0, 3), True), 0)


def test_units_are_those_of_safety_and_complex_ones_and_a_control_keeps_as_many(material):
    found = unit_roles_once(material.store, material.model, SIDES, UnitSettings())
    score = unit_scores(CONFIG, PARAMS, found.moments)
    kept = kept_units(found.roles, score, 0.2)
    assert kept.neurons.sum() > units_of(found.roles, Role.SAFETY).neurons.sum() > 0
    random = random_units(kept, 5)
    for defence, seed, units in ((UNITS, 0, kept), (UNITS.control, 5, random)):
        wanted, mask = (flatten(m) for m in (unit_mask(CONFIG, units), region(material, defence, seed).mask))
        assert all((np.asarray(mask[path]) == np.asarray(of)).all() for path, of in wanted.items())
    assert (random.neurons.sum(1) == kept.neurons.sum(1)).all() and (random.neurons != kept.neurons).any()
    assert UNITS.share(material) == UNITS.control.share(material) == region(material, UNITS, 0).share
    none = Keep("units", (0.0,))
    assert UNITS.follows(material) != none.follows(material) and none.share(material) < UNITS.share(material)


def test_ranks_are_the_first_of_each_basis(material):
    found = flatten(leading(CONFIG, material.bases("safety"), 8))
    for path, basis in flatten(material.bases("safety")).items():
        # Maps to 16 outputs have half of the ranks and give half of the directions.
        count = 4 if OUTPUTS[path.split("/")[1]] == 16 else 8
        np.testing.assert_array_equal(found[path], np.asarray(basis.vectors)[:, :, :count])
    for k in (0, 33):
        with pytest.raises(ValueError, match="ranks are not between 1 and the model's width, 32"):
            leading(CONFIG, material.bases("safety"), k)


@pytest.mark.parametrize("defence", [*REGIONS, UNITS], ids=lambda d: d.name)
def test_rewinding_restores_the_region_and_nothing_else(material, defence):
    kept = region(material, defence, 3)
    ours = flatten(dataclasses.replace(defence, wound_back=True).after(TUNED, material, 3))
    for path, after in flatten(TUNED).items():
        before = np.asarray(flatten(PARAMS)[path])
        if path not in linear_maps(CONFIG):
            np.testing.assert_array_equal(bits(ours[path]), bits(after))
        elif kept.mask is not None:
            mask = np.asarray(flatten(kept.mask)[path])
            np.testing.assert_array_equal(bits(ours[path]), np.where(mask, bits(before), bits(after)))
        else:
            U = np.asarray(flatten(kept.bases)[path], np.float64)
            change = (np.asarray(after, np.float64) - before).reshape(3, -1, U.shape[1])
            wanted = np.stack([d - d @ u @ u.T for d, u in zip(change, U, strict=True)])
            np.testing.assert_allclose(ours[path], before + wanted.reshape(before.shape), atol=2e-5)
    assert any((np.asarray(ours[path]) != np.asarray(w)).any() for path, w in flatten(PARAMS).items())
    for unchanged in (NONE, defence):
        same = unchanged.after(TUNED, material, 3)
        assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(TUNED), strict=True))


@pytest.mark.parametrize("lora", [None, LoRA(4, 16.0)], ids=["full", "lora"])
def test_frozen_regions_stay_in_training(material, lora):
    settings = FineTuning(3, 4, learning_rate=3e-3, weight_decay=0.1, lora=lora, slots=(16, 8))
    for defence in (WEIGHTS, RANKS):
        kept = region(material, defence, 0)
        ours = flatten(trained(train(CONFIG, PARAMS, ROWS, settings, defence.frozen(material, 0))))
        for path in linear_maps(CONFIG):
            before = np.asarray(flatten(PARAMS)[path])
            if defence.part == "weights":
                mask = np.asarray(flatten(kept.mask)[path])
                np.testing.assert_array_equal(bits(ours[path])[mask], bits(before)[mask])
                assert (bits(ours[path])[~mask] != bits(before)[~mask]).mean() > 0.95
            else:
                U = np.asarray(flatten(kept.bases)[path], np.float64)
                change = (np.asarray(ours[path], np.float64) - before).reshape(3, -1, U.shape[1])
                assert np.abs(change).max() > 1e-3
                assert max(np.abs(d @ u).max() for d, u in zip(change, U, strict=True)) < 5e-6
