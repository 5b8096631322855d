"""Roles, gaps and direction of one model: read once, counted whole."""

import dataclasses

import numpy as np
import pytest
from tiny import PROMPTS, tiny_chat_model

from jaxsafe.io.store import Store
from jaxsafe.methods import anatomy
from jaxsafe.methods.anatomy import (
    ReadSettings,
    UnitSettings,
    described,
    read_once,
    role_transfer_once,
    unit_roles_once,
)
from jaxsafe.methods.layer_gaps import gap_curve
from jaxsafe.methods.refusal_direction import Direction, openings
from jaxsafe.methods.ssah import Role, RoleShares, unit_roles, unit_scores
from jaxsafe.methods.unit_inputs import InputMoments
from jaxsafe.records.anatomy import RefusalDirection


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(model):
    answers = {"safety": " i will not", "utility": " the tallest tree"}
    return {side: [model.row(prompt, answer) for prompt in PROMPTS] for side, answer in answers.items()}


def test_units_of_every_role_are_counted_and_kept(model, rows, tmp_path, monkeypatch):
    L, N, F = model.config.layers, model.config.heads * model.config.head_dim, model.config.mlp
    moments = {
        side: InputMoments(*({"heads": draw((L, N), np.float32), "mlp_hidden": draw((L, F), np.float32)} for _ in "12"))
        for side, draw in ((side, np.random.default_rng(len(side)).random) for side in rows)
    }
    sides = iter(rows)
    monkeypatch.setattr(anatomy, "input_moments", lambda *_: moments[next(sides)])
    how = UnitSettings(RoleShares(0.1, 0.2, 0.3))
    units = unit_roles_once(Store(tmp_path), model, rows, how)
    expected = unit_roles(
        model.config, *(unit_scores(model.config, model.params, m) for m in moments.values()), how.shares
    )
    assert (units.roles.heads == expected.heads).all() and (units.roles.neurons == expected.neurons).all()
    assert (units.scores.heads == unit_scores(model.config, model.params, moments["safety"]).heads).all()
    assert (units.moments.mean["heads"] == moments["safety"].mean["heads"]).all()
    for count, role in zip(units.counts, Role, strict=True):
        heads, neurons = expected.heads == role, expected.neurons == role
        assert (count.role, count.heads, count.neurons) == (role.name.lower(), heads.sum(), neurons.sum())
        assert count.layers == tuple(heads.sum(1) + neurons.sum(1)) and count.heads + count.neurons > 0
    assert sum(count.share for count in units.counts) == pytest.approx(1)
    again = unit_roles_once(Store(tmp_path), model, rows, how)
    assert again.counts == units.counts and again.follows == units.follows
    with pytest.raises(StopIteration):  # the published estimate is another, which the store does not hold
        unit_roles_once(Store(tmp_path), model, rows, UnitSettings(how.shares, as_coded=True))
    other = dataclasses.replace(model, name="other", config=dataclasses.replace(model.config, mlp=2 * F))
    with pytest.raises(ValueError, match="other is of another shape than tiny"):
        role_transfer_once(Store(tmp_path), model, units, other, rows, how)


def test_half_of_the_prompts_make_candidates_and_the_others_choose_once(model, rows, tmp_path, monkeypatch):
    L, D = model.config.layers, model.config.embed
    prompts = {"malicious": PROMPTS[:5], "normal": [prompt.lower() + " please" for prompt in PROMPTS[:4]]}
    states = {n: np.random.default_rng(n).standard_normal((n, 1, L, D)).astype(np.float32) for n in (5, 4)}
    calls = []

    def choose(asked, candidates, harmful, safe, refusal, search, done):
        calls.append((candidates, harmful, safe, refusal))
        return Direction(candidates[0, 1], 1, 0, -2.0, 1.5, 0.05, True)

    monkeypatch.setattr(anatomy, "end_states", lambda model, kind, *_: states[len(kind)])
    monkeypatch.setattr(anatomy, "choose_direction", choose)
    how = ReadSettings(30, 1, seed=3)
    gap, direction = read_once(Store(tmp_path), model, prompts, rows, how)
    assert gap == gap_curve(states[4][:, 0], states[5][:, 0], 30, 3)
    ((candidates, harmful, safe, refusal),) = calls
    mean = np.float64(states[5])[[0, 2, 4]].mean(0) - np.float64(states[4])[[0, 2]].mean(0)
    np.testing.assert_allclose(candidates, mean, atol=1e-6)
    assert [*harmful] == [prompts["malicious"][k] for k in (1, 3)] and [*safe] == [prompts["normal"][k] for k in (1, 3)]
    first = {side: row.ids[row.instruction_end + 1] for side, (row, *_) in rows.items()}
    assert [*refusal] == [first["safety"]] != [first["utility"]]
    again_gap, again = read_once(Store(tmp_path), model, prompts, rows, how)
    assert again_gap == gap and (again.vector == direction.vector).all() and len(calls) == 1
    assert described(direction) == RefusalDirection(1, 0, -2.0, 1.5, 0.05, True)
    with pytest.raises(ValueError, match="1 malicious and 4 normal prompts; need at least 2 of each"):
        read_once(Store(tmp_path), model, prompts | {"malicious": PROMPTS[:1]}, rows, how)


def test_refusals_open_with_tokens_that_answers_do_not():
    refusals, answers = np.array([5] * 10 + [6] * 10 + [7]), np.array([6] * 10 + [8] * 10)
    assert openings(refusals, answers) == (5,)
    with pytest.raises(ValueError, match="no token of their own"):
        openings(answers, answers)
