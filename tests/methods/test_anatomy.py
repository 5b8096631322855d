"""Variants of units and of the refusal direction against what their definitions say of the model."""

import numpy as np
import pytest
from tiny import PROMPTS, tiny_chat_model

from jaxsafe.io.store import Store
from jaxsafe.kernels.forward import capture
from jaxsafe.methods import anatomy
from jaxsafe.methods.anatomy import (
    ReadSettings,
    UnitSettings,
    described,
    direction_variants,
    read_once,
    unit_roles_once,
    unit_variants,
)
from jaxsafe.methods.refusal_direction import Direction, Search, openings
from jaxsafe.methods.ssah import RoleShares
from jaxsafe.rows import pad_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def rows(model):
    answers = {"safety": " i will not", "utility": " the tallest tree"}
    return {side: [model.row(prompt, answer) for prompt in PROMPTS] for side, answer in answers.items()}


def test_units_of_every_role_are_counted_and_kept(model, rows, tmp_path, monkeypatch):
    how = UnitSettings(RoleShares(0.1, 0.2, 0.3))
    found = unit_roles_once(Store(tmp_path), model, rows, how)
    every = model.config.layers * (model.config.heads + model.config.mlp)
    assert sum(count.heads + count.neurons for count in found.counts) == every
    assert [count.role for count in found.counts] == list(anatomy.ROLES)
    monkeypatch.setattr(anatomy, "input_moments", None)
    again = unit_roles_once(Store(tmp_path), model, rows, how)
    assert again.counts == found.counts and again.follows == found.follows
    with pytest.raises(TypeError):
        unit_roles_once(Store(tmp_path), model, rows, UnitSettings(how.shares, as_coded=True))


def test_a_control_prunes_as_many_units_of_each_layer_and_others_by_seed(model, rows, tmp_path):
    found = unit_roles_once(Store(tmp_path), model, rows, UnitSettings(RoleShares(0.1, 0.2, 0.3)))
    made = list(unit_variants(model, found, "redundant", 2))
    names = [variant.name for variant, _ in made]
    assert names == ["redundant units", *(f"random for redundant units seed {seed}" for seed in (0, 1))]
    assert made[0][0].control == names[1] and len({variant.of for variant, _ in made[1:]}) == 1
    lost = []
    for _, make in made:
        down = np.asarray(make().params["layers"]["down"])
        lost.append((down == 0).all(-1).sum(-1).tolist())
    assert lost[0] == lost[1] == lost[2] and sum(lost[0]) > 0
    assert len({str(variant.follows) for variant, _ in made}) == 3


def test_without_the_direction_the_stream_has_no_part_along_it(model):
    vector = np.random.default_rng(7).standard_normal(model.config.embed).astype(np.float32)
    vector /= np.linalg.norm(vector)
    made = list(direction_variants(model, Direction(vector, 1, 0, 0.0, 0.0, 0.0), 1))
    batch = pad_rows(model.rows(PROMPTS[:2]))
    along = []
    for asked in (model, *(make() for _, make in made)):
        states = capture(model.config, model.params, batch.tokens, batch.valid, ("resid",), asked.edits)["resid"]
        along.append(np.abs(np.asarray(states) @ vector).max())
    assert along[1] < 1e-4 < 0.1 < min(along[0], along[2])


def test_a_direction_is_read_once_and_says_whether_it_is_allowed(model, rows, tmp_path, monkeypatch):
    prompts = {"malicious": PROMPTS[:4], "normal": [prompt.lower() + " please" for prompt in PROMPTS[:4]]}
    how = ReadSettings(30, 1, Search(kl=1e9, induced=-1e9, validation=2, last_share=0.0))
    done = []
    gap, direction = read_once(Store(tmp_path), model, prompts, rows, how, done.append)
    assert len(gap.gap) == 2 and gap.prompts == (4, 4) and np.linalg.norm(direction.vector) == pytest.approx(1)
    assert described(direction, how.search).allowed and not described(direction, Search(kl=-1.0)).allowed
    monkeypatch.setattr(anatomy, "end_states", None)
    kept_gap, kept = read_once(Store(tmp_path), model, prompts, rows, how)
    assert kept_gap == gap and (kept.vector == direction.vector).all() and kept.kl == direction.kl
    with pytest.raises(ValueError, match="1 malicious and 4 normal prompts; need at least 2 of each"):
        read_once(Store(tmp_path), model, prompts | {"malicious": PROMPTS[:1]}, rows, how)


def test_refusals_open_with_tokens_that_answers_do_not():
    refusals, answers = np.array([5] * 10 + [6] * 10 + [7]), np.array([6] * 10 + [8] * 10)
    assert openings(refusals, answers) == (5,)
    with pytest.raises(ValueError, match="no token of their own"):
        openings(answers, answers)
