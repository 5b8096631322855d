"""Points of lines and planes: which there are, what they share, and what they are held against."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import tiny_chat_model, tiny_params

from jaxsafe.methods.landscape import ORIGIN, Grid, Ground, Slice, unsafe_answers
from jaxsafe.model.weights import flatten
from jaxsafe.records.run import Sample

LINE = Slice("random", ((-0.5,), (-0.25,), (0.25,), (0.5,)), 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ground(model):
    return Ground(model, other=dataclasses.replace(model, name="other", params=tiny_params(model.config, 1)))


def test_the_published_grid():
    grid = Grid()
    assert [(along.kind, along.seed) for along in grid.slices] == [("random", 0), ("random", 1), ("random", 2)]
    offsets = [offset for (offset,) in grid.slices[0].points]
    assert len(offsets) == 20
    np.testing.assert_allclose(sorted([*offsets, 0]), np.linspace(-0.5, 0.5, 21), atol=1e-12)


def test_a_plane_has_every_pair_but_the_origin():
    grid = Grid(steps=0, plane_steps=4, seed=7)
    (plane,) = grid.slices
    assert len(plane.points) == 24 and (0, 0) not in plane.points and plane.seed == 7
    assert {point[0] for point in plane.points} == {-0.5, -0.25, 0.0, 0.25, 0.5}


def test_toward_another_model_stand_controls_as_far():
    grid = Grid(steps=0, toward=(0.0, 0.5, 1.0), controls=2)
    assert [along.kind for along in grid.slices] == ["toward", "as far", "as far"]
    assert all(along.points == ((0.5,), (1.0,)) for along in grid.slices)


def test_an_odd_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="steps 5 is odd"):
        Grid(steps=5)


def test_a_plane_shares_its_first_axis_with_the_line_of_its_seed(ground):
    plane = Slice("plane", ((0.25, 0.0), (0.0, 0.25), (0.25, 0.25)), 3)
    axis, other, both = (ground.follows(plane, point) for point in plane.points)
    assert axis == ground.follows(LINE, (0.25,)) != other and both == axis + other
    assert ground.follows(plane, (0.0, 0.0)) == ORIGIN.follows == []
    first, second = map(flatten, ground.directions(plane))
    (line,) = map(flatten, ground.directions(LINE))
    assert all(np.array_equal(first[path], line[path]) for path in line)
    dot = sum(float(np.vdot(first[path], second[path])) for path in line)
    assert abs(dot) < 1e-4 * sum(float(np.vdot(first[path], first[path])) for path in line)


def test_directions_of_other_seeds_models_and_norms_are_others(ground, model):
    grounds = ground, dataclasses.replace(ground, per="filter"), Ground(model)
    kinds = [(ground.follows(dataclasses.replace(LINE, seed=4), (0.5,)))]
    kinds += [each.follows(LINE, (0.5,)) for each in grounds[:2]]
    kinds += [ground.follows(Slice(kind, ((0.5,),)), (0.5,)) for kind in ("toward", "as far")]
    assert all(a != b for i, a in enumerate(kinds) for b in kinds[:i])
    with pytest.raises(ValueError, match="toward another model needs one"):
        grounds[2].follows(Slice("toward", ((0.5,),)), (0.5,))
    narrow = dataclasses.replace(model, name="narrow", config=dataclasses.replace(model.config, layers=2))
    with pytest.raises(ValueError, match="narrow is of another shape than tiny"):
        Ground(model, other=narrow)


def test_a_control_is_as_far_in_every_tensor(ground):
    (way,), (control,) = (ground.directions(Slice(kind, ())) for kind in ("toward", "as far"))
    for path, tensor in flatten(way).items():
        drawn = flatten(control)[path]
        axes = tuple(range(int(path.startswith("layers/")), tensor.ndim))  # one layer is one tensor
        a, b = (np.sqrt((np.float64(t) ** 2).sum(axes)) for t in (tensor, drawn))
        np.testing.assert_allclose(a, b, rtol=1e-5)
        assert not np.allclose(tensor, drawn)


def test_variants_are_held_against_the_model_itself_and_a_control(ground):
    toward, *far = Grid(steps=0, toward=(0.5,), controls=2, seed=2).slices
    first, control = ground.variant(toward, (0.5,)), ground.variant(far[0], (0.5,))
    assert first.baseline == control.baseline == "as it is" and first.control == control.name != control.of
    assert control.about["control"] and control.control is None and not first.about["control"]
    (alone,) = Grid(steps=0, toward=(0.5,)).slices
    assert ground.variant(alone, (0.5,)).control is None
    draws = [ground.variant(dataclasses.replace(LINE, seed=seed), (0.5,)) for seed in (0, 1)]
    assert draws[0].of == draws[1].of == "random +0.5" and draws[0].name != draws[1].name


def test_unsafe_answers_are_those_without_a_refusal_in_the_order_of_offsets():
    refused = {  # of two harmful prompts; None could not be judged, and a broken answer counts as papers count it
        "random +0.25, draw 3": (False, False),
        "as it is": (True, True),
        "random -0.5, draw 3": (None, False),
        "random +0.5, draw 3": (True, None),
        "random -0.25, draw 3": (False, True),
    }

    def samples(name, verdicts):
        harmful = [Sample(name, "s", "vanilla", True, "", "p", "t", refused, broken=True) for refused in verdicts]
        others = {"harmful": False}, {"setting": "prefill"}
        return [*harmful, *(dataclasses.replace(harmful[0], refused=False, **other) for other in others)]

    examined = {name: SimpleNamespace(samples=samples(name, verdicts)) for name, verdicts in refused.items()}
    study = SimpleNamespace(exam=SimpleNamespace(settings=[SimpleNamespace(name="vanilla")]), examined=examined)
    (line,) = unsafe_answers(study, [LINE])
    assert line.astype(int).tolist() == [[1, 1], [1, 0], [0, 0], [1, 1], [0, 1]]
