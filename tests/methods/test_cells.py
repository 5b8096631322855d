"""Cells of a grid as variants, and training runs that are examined as they go, against plain loops over the trainer."""

import contextlib
import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from tiny import random_rows, tiny_chat_model, tiny_config

from jaxsafe.evaluation.judges.keyword import KeywordJudge
from jaxsafe.evaluation.language import text_rows
from jaxsafe.evaluation.settings import setting
from jaxsafe.io.store import Store
from jaxsafe.kernels.freezing import freeze
from jaxsafe.kernels.lora import MAPS, LoRA
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.kernels.units import layer_mask
from jaxsafe.methods import cells
from jaxsafe.methods.attacks import preset
from jaxsafe.methods.brittleness import Material
from jaxsafe.methods.cells import Cell, Grid, Tuning, Work, before, examine_run, examine_together, runs
from jaxsafe.methods.defences import NONE, Defence, Keep, defences
from jaxsafe.methods.trainer import FineTuning, train
from jaxsafe.model.layers import LayerRange
from jaxsafe.model.weights import flatten, linear_maps, nest
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.records.run import Variant
from jaxsafe.rows import data_sha256
from jaxsafe.study.exam import Exam
from jaxsafe.study.study import Study

CONFIG = tiny_config()
SIDES = {
    "safety": random_rows([20, 31, 17, 25], behind=[5, 7, 3, 9]),
    "utility": random_rows([24, 30, 22, 41], behind=[14, 9, 12, 21], seed=1),
}
ROWS = random_rows([14, 16, 13, 15, 16, 14], behind=[4, 7, 3, 5, 2, 6])
RANKS, LAYERS = Keep("ranks", (8,)), Keep("layers", (1, 2))
SHIFT, FULL = preset("identity_shift"), Tuning("full")
SETTINGS = FineTuning(4, 3, learning_rate=3e-3, weight_decay=0.1, slots=(16, 8), seed=1, checkpoint_every=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def material(model, tmp_path_factory):
    return Material(model, SIDES.get, Store(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def exam(model):
    harmful = PromptSet("asked", ("how do i bake bread?", "who invented the kite?"), (True, True), ("", ""))
    safe = PromptSet("safe", ("tell me the rules of a quiet game.",), (False,), ("",))
    texts = text_rows(model, ["the river and the boat are older than the lantern by the window"], "whole")
    vowels = KeywordJudge("vowels", "1", lambda text: sum(c in "aeiou" for c in text) % 2 == 0)
    return Exam((harmful, safe), (setting("vanilla"),), vowels, Decoding(4), tuple(texts), batch_size=4)


# The grid


def test_rewinds_belong_to_the_undefended_run():
    guards = defences({"weights": ((0.1, 0.2),), "ranks": (4,)}, controls=True, rewinds=True)
    tunings = [FULL, Tuning("lora", LoRA(2), 1e-3)]
    grid = runs([SHIFT], tunings, guards, (0, 1))
    assert len(grid) == 2 * 2 * 5
    cells = list(itertools.chain(*grid))
    assert len({c.name for c in cells}) == len(cells) == 2 * 2 * 9
    for group in grid:
        assert len({(c.tuning, c.seed) for c in group}) == 1 and group[0].defence.trained_as == group[0].defence
        assert all(c.defence.trained_as == group[0].defence == NONE for c in group[1:])
        assert len(group) == (5 if group[0].defence == NONE else 1)
    no_rewinds = runs([SHIFT], tunings[:1], guards[:3], (0,))
    assert [[c.defence.name for c in group] for group in no_rewinds] == [[d.name] for d in guards[:3]]


# Variants


def test_cells_are_variants(material):
    settings = FineTuning(10, 4, slots=(16, 8), checkpoint_every=5)
    guards = defences({"ranks": (4,)}, controls=True, rewinds=True)
    none, frozen, random, back, random_back = (Cell(SHIFT, FULL, g, 3) for g in guards)

    def variant(cell, step=10, settings=settings, rows=ROWS, guards=guards):
        return cell.variant(step, settings, rows, material, guards)

    start = before(none.attack)
    assert start.about["step"] == 0 and start.about["tuning"] is None and start.baseline is None
    assert variant(none).baseline == start.name and variant(none).control is None
    for cell, control in ((frozen, random), (back, random_back), (random, None), (random_back, None)):
        found = variant(cell)
        assert found.baseline == variant(none).name
        assert found.control == (None if control is None else variant(control).name)
    alone = variant(frozen, guards=())
    assert alone.control is None and alone.follows == variant(frozen).follows
    assert variant(frozen).group == "identity_shift n=10, full, freeze ranks k=4, step 10"
    assert variant(frozen).name == "identity_shift n=10, full, freeze ranks k=4, seed 3, step 10"
    assert variant(random_back, 5).about == {
        "attack": "identity_shift n=10",
        "tuning": "full",
        "defence": "rewind random ranks k=4",
        "region": "ranks k=4",
        "control": True,
        "rewind": True,
        "share": RANKS.share(material) / 2,
        "step": 5,
        "last": False,
    }
    # Neither padding nor checkpoints change a result; rows, settings, the step and the defence do.
    same = dataclasses.replace(settings, slots=None, checkpoint_every=2)
    assert variant(none, settings=same).follows == variant(none).follows
    # Where nothing is dropped, nothing is said of it.
    (run, *_), (other, *_) = (
        variant(none, settings=dataclasses.replace(settings, lora=LoRA(2, dropout=p))).follows for p in (0.0, 0.1)
    )
    assert run["lora"] == {"rank": 2, "alpha": 16.0, "maps": MAPS} and other["lora"] == run["lora"] | {"dropout": 0.1}
    others = [
        variant(none),
        variant(none, 5),
        variant(none, settings=dataclasses.replace(settings, seed=1)),
        variant(none, rows=ROWS[1:]),
        *map(variant, (frozen, random, back, random_back)),
    ]
    assert len({json.dumps(each.follows) for each in others}) == len(others)


def test_a_run_that_is_missing_is_named():
    with pytest.raises(ValueError, match="'rewind layers first=1 stop=2' acts after a run of 'none', which is missing"):
        runs([SHIFT], [FULL], [LAYERS, dataclasses.replace(LAYERS, wound_back=True)], (0,))


# Defences of a user's own, which nothing else knows


@dataclasses.dataclass(frozen=True)
class Half(Defence):
    """Trains on every second row alone."""

    name = "every second row"

    def rows(self, rows):
        return rows[::2]


@dataclasses.dataclass(frozen=True)
class Averaged(Defence):
    """Goes back a share of the way to the weights before the attack, in a run of its own or after the undefended."""

    back: float
    own_run: bool = False

    @property
    def name(self):
        return f"{self.back:g} of the way back" + (" of its own run" if self.own_run else "")

    @property
    def trained_as(self):
        return self if self.own_run else NONE

    def after(self, tuned, material, seed):
        return jax.tree.map(lambda new, old: (1 - self.back) * new + self.back * old, tuned, material.params)


# Runs


def study_in(folder, model, exam):
    return Study(folder, model, exam)


def weights_of(settings, model, rows, frozen=None):
    """Losses and weights by step of a plain loop over the trainer."""
    more = {} if frozen is None else {"frozen": frozen}
    steps = [
        (step.number, step.loss, jax.tree.map(np.array, step.weights()))
        for step in train(model.config, model.params, rows, settings, **more)
    ]
    return {n: loss for n, loss, _ in steps if n}, {n: weights for n, _, weights in steps}


def bare(result):
    """What an exam found, without the name of the variant."""
    return {k: v for k, v in vars(result).items() if k not in ("variant", "key")}


def examined_alone(folder, model, exam, weights):
    """What the exam finds of these weights in a study of their own."""
    study = study_in(folder, model, exam)
    result = study.examine(Variant("alone", "alone"), model.with_params(weights))
    return bare(result), [dataclasses.replace(s, variant="") for s in study.examined["alone"].samples]


def found(study, name):
    own = study.examined[name]
    return bare(own.result), [dataclasses.replace(s, variant="") for s in own.samples]


def test_losses_and_results_are_those_of_a_plain_loop(model, material, exam, tmp_path):
    guards = defences({"layers": ((1, 2),)}, controls=False, rewinds=True)
    (free, rewinding), (freezing,) = runs([SHIFT], [FULL], guards, (1,))
    grid = Grid(material, tuple(guards), every=3)
    study = study_in(tmp_path / "study", model, exam)
    losses = examine_run(Work(study, [free, rewinding], SETTINGS, ROWS, grid))
    assert [*study.examined] == [f"{free.name}, step 3", f"{free.name}, step 4", f"{rewinding.name}, step 4"]
    wanted, weights = weights_of(SETTINGS, model, ROWS)
    assert losses == {f"{free.name}, step {n}": wanted[n] for n in (3, 4)}
    for n in (3, 4):
        assert found(study, f"{free.name}, step {n}") == examined_alone(tmp_path / f"{n}", model, exam, weights[n])
    # The rewind is examined with its layers as they were and the others as they became.
    back = {
        path: jnp.where((jnp.arange(3) == 1).reshape(-1, *[1] * (w.ndim - 1)), flatten(model.params)[path], w)
        if path in linear_maps(CONFIG)
        else w
        for path, w in flatten(weights[4]).items()
    }
    ours = found(study, f"{rewinding.name}, step 4")
    assert ours == examined_alone(tmp_path / "back", model, exam, nest(back))
    assert ours != found(study, f"{free.name}, step 4")

    losses = examine_run(Work(study, [freezing], SETTINGS, ROWS, grid))
    wanted, weights = weights_of(SETTINGS, model, ROWS, freeze(layer_mask(CONFIG, LayerRange(1, 2))))
    assert losses == {f"{freezing.name}, step {n}": wanted[n] for n in (3, 4)}
    name = f"{freezing.name}, step 4"
    assert found(study, name) == examined_alone(tmp_path / "frozen", model, exam, weights[4])
    assert study.examined[name].result.variant.baseline == f"{free.name}, step 4"


def test_steps_that_are_named_are_examined_too(model, material, exam, tmp_path):
    study, cell = study_in(tmp_path, model, exam), Cell(SHIFT, FULL, NONE, 1)
    losses = examine_run(Work(study, [cell], SETTINGS, ROWS, Grid(material, (NONE,), at=(1, 3))))
    assert [*losses] == [*study.examined] == [f"{cell.name}, step {n}" for n in (1, 3, 4)]


def test_only_the_end_is_examined_where_no_step_is_due(model, material, exam, tmp_path):
    study = study_in(tmp_path, model, exam)
    losses = examine_run(Work(study, [Cell(SHIFT, FULL, NONE, 1)], SETTINGS, ROWS, Grid(material, (NONE,))))
    assert [*losses] == [*study.examined] == ["identity_shift n=10, full, none, seed 1, step 4"]


def test_what_is_learned_is_counted(model, material, exam, tmp_path):
    grid = Grid(material, (NONE,))
    examine_run(Work(study_in(tmp_path, model, exam), [Cell(SHIFT, FULL, NONE, 1)], SETTINGS, ROWS, grid))
    mean = sum(len(row.ids) for row in ROWS) / len(ROWS)
    assert sum(tokens.learned for tokens in grid.tokens) == 4 * round(3 * mean)


class Stopped(Exception):
    """Ends a run in the middle."""


def stops_at(step):
    """A watch whose progress raises once `step` steps are finished."""

    @contextlib.contextmanager
    def watch(stage, total):
        steps = 0

        def done(n):
            nonlocal steps
            steps += n
            if steps == step:
                raise Stopped

        yield done

    return watch


@pytest.mark.parametrize("lora", [None, LoRA(4, 16.0)], ids=["full", "lora"])
def test_a_run_interrupted_at_any_step_ends_with_the_same_results(model, material, exam, tmp_path, monkeypatch, lora):
    settings = dataclasses.replace(SETTINGS, lora=lora)
    guards = defences({"layers": ((1, 2),)}, controls=False, rewinds=True)
    (free, rewinding), _ = runs([SHIFT], [FULL], guards, (1,))
    whole = study_in(tmp_path / "whole", model, exam)
    losses = examine_run(Work(whole, [free, rewinding], settings, ROWS, Grid(material, tuple(guards), every=2)))
    begun, run = [], cells.train

    def noted(*how):
        for step in run(*how):
            if step.begins:
                begun.append(step.number)
            yield step

    monkeypatch.setattr(cells, "train", noted)
    for stop in range(settings.steps + 1):
        out, begun[:] = tmp_path / f"stopped at {stop}", []
        study = study_in(out, model, exam)
        grid = Grid(material, tuple(guards), 2, out / "checkpoints", stops_at(stop))
        with pytest.raises(Stopped):
            examine_run(Work(study, [free, rewinding], settings, ROWS, grid))
        # Another process begins with what lies in the folder.
        again = study_in(out, model, exam)
        grid = Grid(material, tuple(guards), 2, out / "checkpoints")
        assert examine_run(Work(again, [free, rewinding], settings, ROWS, grid)) == losses
        # Whatever ends a run, no step is taken twice: one that was not examined is examined from its checkpoint.
        assert begun == [0, stop]
        assert not list((out / "checkpoints").iterdir())
        assert [*again.examined] == [*whole.examined]
        for name, result in whole.examined.items():
            assert again.examined[name].result == result.result and again.examined[name].samples == result.samples
        # What is finished is read.
        monkeypatch.setattr(cells, "train", lambda *_: pytest.fail("trained again"))
        assert examine_run(Work(study_in(out, model, exam), [free, rewinding], settings, ROWS, grid)) == losses
        monkeypatch.setattr(cells, "train", noted)


def test_a_run_interrupted_in_an_exam_or_before_its_rewinds_goes_on(model, material, exam, tmp_path, monkeypatch):
    guards = defences({"layers": ((1, 2),)}, controls=False, rewinds=True)
    (free, rewinding), _ = runs([SHIFT], [FULL], guards, (1,))
    whole = study_in(tmp_path / "whole", model, exam)
    examine_run(Work(whole, [free, rewinding], SETTINGS, ROWS, Grid(material, tuple(guards), every=2)))
    examine = Study.examine
    for place, begin in enumerate((2, 4, 4)):
        out, calls = tmp_path / f"{place}", []

        def dies(self, variant, make, place=place, calls=calls):
            calls.append(variant.name)
            if len(calls) == place + 1:
                raise Stopped
            return examine(self, variant, make)

        grid = Grid(material, tuple(guards), 2, out / "checkpoints")
        with monkeypatch.context() as patch:
            patch.setattr(Study, "examine", dies)
            with pytest.raises(Stopped):
                examine_run(Work(study_in(out, model, exam), [free, rewinding], SETTINGS, ROWS, grid))
        numbers = []

        def noted(*how, run=cells.train, numbers=numbers):
            for step in run(*how):
                numbers.append(step.number)
                yield step

        with monkeypatch.context() as patch:
            patch.setattr(cells, "train", noted)
            again = study_in(out, model, exam)
            examine_run(Work(again, [free, rewinding], SETTINGS, ROWS, grid))
        assert numbers == list(range(begin, 5))
        assert {n: e.result for n, e in again.examined.items()} == {n: e.result for n, e in whole.examined.items()}


def test_steps_behind_a_checkpoint_that_are_not_examined_are_trained_again(model, material, exam, tmp_path):
    cell = Cell(SHIFT, FULL, NONE, 1)
    grid = Grid(material, (NONE,), 0, tmp_path / "checkpoints", stops_at(4))
    with pytest.raises(Stopped):
        examine_run(Work(study_in(tmp_path, model, exam), [cell], SETTINGS, ROWS, grid))
    # A closer look than the interrupted run had: its checkpoint after three steps knows nothing of steps 1 and 2.
    closer = Grid(material, (NONE,), 1, tmp_path / "checkpoints")
    losses = examine_run(Work(study_in(tmp_path, model, exam), [cell], SETTINGS, ROWS, closer))
    assert losses == {f"{cell.name}, step {n}": loss for n, loss in weights_of(SETTINGS, model, ROWS)[0].items()}
    assert not list((tmp_path / "checkpoints").iterdir())


# Runs at once


ADAPTERS = Tuning("lora", LoRA(4, 16.0), 3e-3)


def work_of(study, grid, guards, tunings=(ADAPTERS,), seeds=(0, 1)):
    """The runs of a grid, as a launch script makes them."""
    return [
        Work(study, group, settings_of(group[0]), ROWS[group[0].seed :], grid)
        for group in runs([SHIFT], tunings, guards, seeds)
    ]


def settings_of(cell):
    rate = cell.tuning.learning_rate or 3e-3
    return dataclasses.replace(SETTINGS, seed=cell.seed, lora=cell.tuning.lora, learning_rate=rate)


def losses_of(work):
    return {k: v for w in work for k, v in examine_run(w).items()}


def test_runs_at_once_leave_what_runs_alone_do_and_go_on(model, material, exam, tmp_path, monkeypatch):
    guards = [NONE, Averaged(0.5)]
    alone = study_in(tmp_path / "alone", model, exam)
    wanted = losses_of(work_of(alone, Grid(material, tuple(guards), 2), guards))
    begun, whole = [], cells.train_together

    def noted(config, params, trainings, mesh):
        for step in whole(config, params, trainings, mesh):
            if step[0].begins:
                begun.append((len(trainings), step[0].number))
            yield step

    monkeypatch.setattr(cells, "train_together", noted)
    monkeypatch.setattr(cells, "train", lambda *_: pytest.fail("trained alone"))
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        stopping = Grid(material, tuple(guards), 2, out / "checkpoints", stops_at(3))
        examine_together(work_of(study_in(out, model, exam), stopping, guards), 3)
    study = study_in(out, model, exam)
    work = work_of(study, Grid(material, tuple(guards), 2, out / "checkpoints"), guards)
    for _ in range(2):  # they go on; then there is nothing left to do
        examine_together(work, 3)
        assert begun == [(2, 0), (2, 3)] and not study.examined
    assert losses_of(work) == pytest.approx(wanted, abs=1e-4)
    assert [*study.examined] == [*alone.examined]
    for name, result in alone.examined.items():
        assert study.examined[name].result.variant == result.result.variant
        assert study.examined[name].result.perplexity == pytest.approx(result.result.perplexity, rel=1e-3)
    assert not list((out / "checkpoints").iterdir())


def test_what_has_no_like_is_left_alone(model, material, exam, tmp_path, monkeypatch):
    groups = []
    monkeypatch.setattr(cells, "_train_together", lambda works, kept: groups.append([w.cell.seed for w in works]))
    study, guards = study_in(tmp_path, model, exam), defences({"layers": ((1, 2),)}, controls=False, rewinds=False)
    grid = Grid(material, tuple(guards))
    examine_together(work_of(study, grid, [NONE], [FULL]), 4)
    examine_together(work_of(study, grid, guards, seeds=(0,)), 4)
    examine_together(work_of(study, grid, [NONE]), 1)
    assert not groups
    examine_together(work_of(study, grid, [NONE], seeds=range(5)), 2)
    assert groups == [[0, 1], [2, 3]]


def test_seeds_share_one_compiled_step(model, material, exam, tmp_path):
    guards = defences({"layers": ((1, 2),)}, controls=True, rewinds=True)
    study, grid = study_in(tmp_path, model, exam), Grid(material, tuple(guards), every=2)
    compiled, by_run = compilations(), []
    for seed in (0, 1, 2):
        for group in runs([SHIFT], [FULL], guards, (seed,)):
            rows = ROWS[seed:] + ROWS[:seed]
            examine_run(Work(study, group, dataclasses.replace(SETTINGS, seed=seed), rows, grid))
            by_run.append(len(compiled))
    undefended, frozen, *others = by_run
    assert 0 < undefended <= frozen and others == [frozen] * 7
    assert len(study.examined) == 3 * (2 * 3 + 2)


# Other defences


def test_a_defence_of_the_rows_needs_nothing_elsewhere(model, material, exam, tmp_path):
    guards = [NONE, Half()]
    (free,), (half,) = runs([SHIFT], [FULL], guards, (1,))
    study, grid = study_in(tmp_path / "study", model, exam), Grid(material, tuple(guards))
    examine_run(Work(study, [free], SETTINGS, ROWS, grid))
    losses = examine_run(Work(study, [half], SETTINGS, ROWS, grid))
    wanted, weights = weights_of(SETTINGS, model, ROWS[::2])
    name = "identity_shift n=10, full, every second row, seed 1, step 4"
    assert losses == {name: wanted[4]}
    assert found(study, name) == examined_alone(tmp_path / "alone", model, exam, weights[4])
    variant = study.examined[name].result.variant
    assert (variant.baseline, variant.control) == (f"{free.name}, step 4", None)
    assert (variant.about["defence"], variant.about["share"]) == ("every second row", 0.0)
    assert data_sha256(ROWS[::2]) in json.dumps(variant.follows)
    # Rows that the defence leaves out change nothing; those that it keeps do.
    other = [ROWS[0], *ROWS[2:3], *ROWS[2:]]
    assert half.variant(4, SETTINGS, other, material).follows == variant.follows
    assert half.variant(4, SETTINGS, ROWS[1:], material).follows != variant.follows


def test_a_defence_that_leaves_no_rows_is_refused(model, material, exam, tmp_path):
    class Nothing(Half):
        def rows(self, rows):
            return rows[:0]

    with pytest.raises(ValueError, match="none of the 0 rows has an answer to train on"):
        examine_run(
            Work(study_in(tmp_path, model, exam), [Cell(SHIFT, FULL, Nothing(), 1)], SETTINGS, ROWS, Grid(material, ()))
        )


@pytest.mark.parametrize("own_run", [False, True], ids=["after the undefended run", "after its own"])
def test_a_defence_of_the_weights_needs_nothing_elsewhere(model, material, exam, tmp_path, own_run):
    guards = [NONE, Averaged(0.5, own_run)]
    grid = Grid(material, tuple(guards), every=2)
    study = study_in(tmp_path / "study", model, exam)
    groups = runs([SHIFT], [FULL], guards, (1,))
    assert [len(group) for group in groups] == ([1, 1] if own_run else [2])
    for group in groups:
        examine_run(Work(study, group, SETTINGS, ROWS, grid))
    _, weights = weights_of(SETTINGS, model, ROWS)
    averaged = Cell(SHIFT, FULL, guards[1], 1)
    # In a run of its own the model is what the defence makes of it at every step.
    for n in (2, 4) if own_run else (4,):
        mean = jax.tree.map(lambda new, old: 0.5 * new + 0.5 * old, weights[n], model.params)
        ours = found(study, f"{averaged.name}, step {n}")
        assert ours == examined_alone(tmp_path / f"{n}", model, exam, mean)
        assert ours != found(study, f"{Cell(SHIFT, FULL, NONE, 1).name}, step {n}")
