"""Runs trained at once against each of them alone: losses, weights, ranks, dropped inputs, checkpoints, programs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny import random_rows, tiny_config, tiny_params

from jaxsafe.kernels.lora import LoRA
from jaxsafe.kernels.training import batch_plan
from jaxsafe.methods.together import Training, latest_step, member, resized, stacked, train_together
from jaxsafe.methods.trainer import FREE, FineTuning, begin, compiled_step, joined, train
from jaxsafe.model.weights import shardings
from jaxsafe.parallel import parse_mesh
from jaxsafe.rows import Row, pad_rows

CONFIG = tiny_config(layers=2)
ROWS = random_rows([14, 16, 13, 15, 16, 14, 13], behind=[4, 7, 3, 5, 2, 6, 3])
SETTINGS = FineTuning(
    4, 3, learning_rate=3e-3, schedule="stepped", decay=0.5, decay_every=2, weight_decay=0.1, slots=(16, 8)
)
DROPPED = LoRA(2, 8.0, ("q", "down"), dropout=0.3)


@functools.cache
def params():
    return tiny_params(CONFIG)


def trainings(folder=None):
    """Runs that differ in rows, seed, rate and rank."""
    return [
        Training(
            ROWS[seed:],
            dataclasses.replace(SETTINGS, seed=seed, learning_rate=rate, lora=dataclasses.replace(DROPPED, rank=rank)),
            folder and folder / str(seed),
        )
        for seed, rate, rank in [(0, 3e-3, 2), (1, 1e-2, 4)]
    ]


def alone(run, folder=None):
    return [
        (step.number, step.loss, jax.tree.map(np.array, step.adapters), jax.tree.map(np.array, step.weights()))
        for step in train(CONFIG, params(), run.rows, run.settings, folder=folder)
    ]


def close(ours, wanted, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), ours, wanted)


@pytest.fixture(scope="module")
def wanted():
    return [alone(run) for run in trainings()]


def check(together, wanted, first=0):
    seen = list(together)
    assert len(seen) == SETTINGS.steps + 1 - first
    for n, steps in enumerate(wanted):
        for ours, (number, loss, adapters, _) in zip([step[n] for step in seen], steps[first:], strict=True):
            assert ours.number == number
            assert ours.loss == (None if loss is None else pytest.approx(loss, abs=1e-5))
            assert jax.tree.map(np.shape, ours.adapters) == jax.tree.map(np.shape, adapters)
        close(seen[-1][n].weights(), steps[-1][3])
        close(seen[-1][n].adapters, steps[-1][2])


def test_runs_at_once_are_the_runs_alone(wanted):
    check(train_together(CONFIG, params(), trainings()), wanted)
    moved = [np.abs(steps[-1][3]["layers"]["q"] - params()["layers"]["q"]).max() for steps in wanted]
    assert min(moved) > 1e-3
    ranks = [np.linalg.matrix_rank(s[-1][3]["layers"]["down"][1] - params()["layers"]["down"][1], 1e-5) for s in wanted]
    assert ranks == [2, 4]


def test_runs_whose_rows_begin_alike_are_the_runs_alone():
    begin = random_rows([24], seed=5)[0].ids
    runs = []
    for run in trainings():
        rows = [Row((*begin, *row.ids), 24 + row.instruction_end) for row in run.rows]
        lora = dataclasses.replace(run.settings.lora, dropout=0.0)
        runs.append(Training(rows, dataclasses.replace(run.settings, slots=(40, 8), lora=lora)))
    assert {joined(run.rows, run.settings, None) for run in runs} == {24}
    check(train_together(CONFIG, params(), runs), [alone(run) for run in runs])


def test_either_way_goes_on_from_the_checkpoints_of_the_other(wanted, tmp_path):
    runs = trainings(tmp_path)
    for run in runs:
        begun = train(CONFIG, params(), run.rows, run.settings, folder=run.folder)
        for _ in range(3):  # where it begins, and two steps
            next(begun)
        begun.close()
    assert [latest_step(run.folder) for run in runs] == [2, 2]
    check(train_together(CONFIG, params(), runs), wanted, first=2)
    last = alone(runs[1], runs[1].folder)
    assert [step[0] for step in last] == [4]
    close(last[0][3], wanted[1][-1][3])
    with pytest.raises(ValueError, match=r"checkpoints are of steps \[4, 0\]; they must be of the same one"):
        next(train_together(CONFIG, params(), [runs[0], dataclasses.replace(runs[1], folder=None)]))


def test_padded_ranks_stay_zero_and_are_cut_off():
    tree = {"q": {"a": np.ones((2, 3, 2)), "b": np.ones((2, 2, 4, 5))}, "count": np.ones(3)}
    wide = resized(tree, 5)
    assert (wide["q"]["a"].shape, wide["q"]["b"].shape) == ((2, 3, 5), (2, 5, 4, 5))
    assert wide["q"]["a"].sum() == tree["q"]["a"].sum() and wide["q"]["b"][:, 2:].sum() == 0
    both = stacked([wide, resized({**tree, "count": 2 * tree["count"]}, 5)])
    for n in (0, 1):
        cut = member(both, n, 2)
        jax.tree.map(np.testing.assert_array_equal, cut, {**tree, "count": (n + 1) * tree["count"]})


def test_what_is_dropped_follows_from_seed_step_and_row_and_from_no_padding(wanted):
    run = trainings()[0]
    tree, fixed, recipe = begin(CONFIG, params(), run.rows, run.settings, FREE, None)
    tree["key"] = jax.random.key_data(jax.random.key(7))
    indices = batch_plan([1] * len(run.rows), 3, 2, run.settings.seed)
    for i, same in enumerate((True, False)):  # B is zero at first
        tree, loss = compiled_step(recipe, tree)(tree, pad_rows([run.rows[j] for j in indices[i]], 16), fixed)
        assert (abs(float(loss) - wanted[0][i + 1][1]) < 1e-6) == same
    other = dataclasses.replace(run, settings=dataclasses.replace(run.settings, slots=(23, 10), accumulation=3))
    close(alone(other)[-1][3], wanted[0][-1][3])


def test_runs_that_differ_in_more_are_refused():
    first, second = trainings()
    for name, value in {"steps": 5, "weight_decay": 0.2, "slots": (20, 8)}.items():
        other = dataclasses.replace(second, settings=dataclasses.replace(second.settings, **{name: value}))
        with pytest.raises(ValueError, match="2 runs need the same settings but for rows, seed"):
            train_together(CONFIG, params(), [first, other])
    for settings in (dataclasses.replace(SETTINGS, lora=None), dataclasses.replace(first.settings, slots=None)):
        with pytest.raises(ValueError, match="need adapters"):
            train_together(CONFIG, params(), [dataclasses.replace(first, settings=settings)])


@pytest.mark.slow
def test_eight_devices_train_several_as_one():
    mesh = parse_mesh("data:-1,model:2")
    runs = [dataclasses.replace(r, settings=dataclasses.replace(r.settings, batch_size=4)) for r in trainings()]
    single = [alone(run)[-1][3] for run in runs]
    placed = jax.device_put(params(), shardings(CONFIG, mesh))
    *_, last = train_together(CONFIG, placed, runs, mesh)
    for step, weights in zip(last, single, strict=True):
        close(step.weights(), weights)
