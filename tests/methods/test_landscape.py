"""Points of lines and planes: which there are, what they share, and that many at once are those of one by one."""

import dataclasses

import numpy as np
import pytest
from tiny import tiny_chat_model, tiny_params

from jaxsafe.evaluation.judges.keyword import KeywordJudge
from jaxsafe.evaluation.language import text_rows
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.methods.landscape import ORIGIN, Grid, Ground, Slice, examine_slice, unsafe_answers
from jaxsafe.model.weights import flatten
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.study import study as study_module
from jaxsafe.study.exam import Exam
from jaxsafe.study.study import Study

LINE = Slice("random", ((-0.5,), (-0.25,), (0.25,), (0.5,)), 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ground(model):
    return Ground(model, other=dataclasses.replace(model, name="other", params=tiny_params(model.config, 1)))


@pytest.fixture(scope="module")
def exam(model):
    harmful = PromptSet("asked", ("how do i bake bread?", "who invented the kite?", "why?"), (True,) * 3, ("",) * 3)
    safe = PromptSet("safe", ("tell me the rules of a quiet game.",), (False,), ("",))
    vowels = KeywordJudge("vowels", "1", lambda text: text.count("e") % 2 == 0)
    texts = tuple(text_rows(model, ["please list three uses of a wooden spoon."], "whole"))
    return Exam((harmful, safe), (*Exam((harmful,)).settings,), vowels, Decoding(4), texts)


def never(*_, **__):
    raise AssertionError("a point was made")


def found(study):
    return {name: (e.result.rates, [s.text for s in e.samples]) for name, e in study.examined.items()}


def test_the_published_grid():
    grid = Grid()
    assert [(along.kind, along.seed) for along in grid.slices] == [("random", 0), ("random", 1), ("random", 2)]
    offsets = [offset for (offset,) in grid.slices[0].points]
    np.testing.assert_allclose(
        [*offsets, 0], [*(a for a in np.linspace(-0.5, 0.5, 21) if abs(a) > 1e-9), 0], atol=1e-12
    )
    assert 0 not in offsets and len(offsets) == 20


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
        lead = tensor.ndim - len(tensor.shape[1:]) if path.startswith("layers/") else 0
        axes = tuple(range(lead, tensor.ndim))
        a, b = (np.sqrt((np.float64(t) ** 2).sum(axes)) for t in (tensor, drawn))
        np.testing.assert_allclose(a, b, rtol=1e-5)
        assert not np.allclose(tensor, drawn)


def test_variants_are_held_against_the_model_itself_and_a_control(ground):
    toward, far = Slice("toward", ((0.5,),)), Slice("as far", ((0.5,),), 2)
    first, control = ground.variant(toward, (0.5,), True), ground.variant(far, (0.5,), True)
    assert first.baseline == control.baseline == "as it is" and first.control == control.of != control.name
    assert ground.variant(toward, (0.5,)).control is None and control.about["control"] and control.control is None
    draws = [ground.variant(dataclasses.replace(LINE, seed=seed), (0.5,)) for seed in (0, 1)]
    assert draws[0].of == draws[1].of == "random +0.5" and draws[0].name != draws[1].name


@pytest.fixture(scope="module")
def one_by_one(ground, model, exam, tmp_path_factory):
    study = Study(tmp_path_factory.mktemp("one"), model, exam)
    study.examine(ORIGIN, model)
    examine_slice(study, ground, LINE)
    return study


def test_points_together_are_those_one_by_one_and_are_made_once(one_by_one, ground, model, exam, tmp_path, monkeypatch):
    study = Study(tmp_path, model, exam)
    study.examine(ORIGIN, model)
    made = []
    original = study_module.examine

    def second_fails(examinee, *rest):
        made.append(len(examinee.rules))
        if len(made) == 2:
            raise KeyboardInterrupt
        return original(examinee, *rest)

    monkeypatch.setattr(study_module, "examine", second_fails)
    with pytest.raises(KeyboardInterrupt):
        examine_slice(study, ground, LINE, 2)
    examine_slice(study, ground, LINE, 2)
    assert made == [2, 2, 2]  # what was finished before the interruption is not made again
    assert found(study) == found(one_by_one)
    for name, examined in study.examined.items():
        assert examined.result.perplexity == pytest.approx(one_by_one.examined[name].result.perplexity, rel=1e-5)

    monkeypatch.setattr(study_module, "examine", never)
    again = Study(tmp_path, model, exam)
    again.examine(ORIGIN, model)
    monkeypatch.setattr(Ground, "directions", never)
    examine_slice(again, ground, LINE, 3)
    assert found(again) == found(one_by_one)


def test_answers_without_a_refusal_are_those_of_the_samples(one_by_one):
    (line,) = unsafe_answers(one_by_one, [LINE])
    names = ["random -0.5, draw 3", "random -0.25, draw 3", "as it is", "random +0.25, draw 3", "random +0.5, draw 3"]
    texts = [[s.text for s in one_by_one.examined[name].samples if s.harmful] for name in names]
    assert line.tolist() == [[text.count("e") % 2 == 1 for text in row] for row in texts]
    assert len({tuple(row) for row in texts}) > 1 and 0 < line.mean() < 1
