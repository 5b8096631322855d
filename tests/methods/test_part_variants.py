"""Variants without units and without a direction, each beside random parts of its size."""

import numpy as np
import pytest
from tiny import tiny_chat_model

from jaxsafe.kernels.units import Units
from jaxsafe.methods.anatomy import UnitRoles
from jaxsafe.methods.part_variants import direction_variants, unit_variants
from jaxsafe.methods.refusal_direction import Direction
from jaxsafe.methods.ssah import Role
from jaxsafe.methods.unit_inputs import InputMoments


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


def test_a_control_prunes_as_many_units_of_each_layer_and_others_by_seed(model):
    L, N, F = model.config.layers, model.config.heads, model.config.mlp
    rng = np.random.default_rng(0)
    roles = Units(rng.integers(4, size=(L, N)), rng.integers(4, size=(L, F)))
    mean = {"heads": np.ones((L, N * model.config.head_dim)), "mlp_hidden": np.ones((L, F))}
    variants = list(unit_variants(model, UnitRoles(roles, roles, InputMoments(mean, {}), ["units"]), "redundant", 2))
    names = [variant.name for variant, _ in variants]
    assert names == ["redundant units", *(f"random for redundant units seed {seed}" for seed in (0, 1))]
    assert variants[0][0].control == names[1] and len({variant.of for variant, _ in variants[1:]}) == 1
    assert len({str(variant.follows) for variant, _ in variants}) == 3
    models = [make() for _, make in variants]
    for name, axes, chosen in (("down", -1, roles.neurons), ("o", (-2, -1), roles.heads)):
        pruned = [(np.asarray(each.params["layers"][name]) == 0).all(axes) for each in models]
        assert (pruned[0] == (chosen == Role.REDUNDANT)).all() and 0 < pruned[0].sum() < pruned[0].size
        for control in pruned[1:]:
            assert control.sum(-1).tolist() == pruned[0].sum(-1).tolist()
        # What pruned units give at their mean, 1, is the sum of their rows: compensation is of what is pruned.
        weight = np.float64(model.params["layers"][name])
        for each, where in zip(models, pruned, strict=True):
            lost = np.where(where[(..., *[None] * (weight.ndim - where.ndim))], weight, 0)
            given = lost.reshape(L, -1, model.config.embed).sum(1)
            np.testing.assert_allclose(np.asarray(each.edits[name].add), given, atol=1e-5)
    assert (np.asarray(models[1].params["layers"]["down"]) != np.asarray(models[2].params["layers"]["down"])).any()


def test_the_direction_and_random_ones_are_ablated_at_whatever_writes_to_the_stream(model):
    vector = np.random.default_rng(7).standard_normal(model.config.embed).astype(np.float32)
    vector /= np.linalg.norm(vector)
    variants = list(direction_variants(model, Direction(vector, 1, 0, 0.0, 0.0, 0.0, True), 2))
    assert [variant.group for variant, _ in variants] == ["refusal direction", *["random for refusal direction"] * 2]
    lines = []
    for _, make in variants:
        edits = make().edits
        assert edits.keys() == {"embed", "o", "down"}
        lines.append(np.asarray(edits["down"].ablate)[0])
        for tap in edits:
            np.testing.assert_allclose(
                edits[tap].ablate, np.broadcast_to(lines[-1], edits[tap].ablate.shape), atol=1e-6
            )
    np.testing.assert_allclose(lines[0], vector, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(lines, axis=1), 1, atol=1e-6)
    assert np.abs(np.triu(np.float64(lines) @ np.float64(lines).T, 1)).max() < 0.7
