"""Cells of a grid of attacked models, and training runs that are examined as they go."""

import contextlib
import dataclasses
import functools
import pathlib
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence

import jax

from jaxsafe.chat.model import ChatModel
from jaxsafe.evaluation.utilisation import Tokens
from jaxsafe.io.peft import save_peft
from jaxsafe.kernels.lora import LoRA
from jaxsafe.methods.attacks import Attack
from jaxsafe.methods.brittleness import Material
from jaxsafe.methods.defences import NONE, Defence
from jaxsafe.methods.together import Training, latest_step, shared, train_together
from jaxsafe.methods.trainer import FineTuning, Step, described, train
from jaxsafe.model.transformer import Params
from jaxsafe.progress import Watch, unwatched
from jaxsafe.records.attack import About
from jaxsafe.records.run import Variant, plain
from jaxsafe.rows import Row, data_sha256
from jaxsafe.study.study import Study


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How an attack trains: all weights, or adapters; `learning_rate` None leaves the attack's."""

    name: str
    lora: LoRA | None = None
    learning_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One attacked model: an attack, how it trains, what defends, and the seed of examples, order and controls."""

    attack: Attack
    tuning: Tuning
    defence: Defence
    seed: int

    @property
    def name(self) -> str:
        """A name that tells it from every other cell of a grid."""
        return f"{self.group}, seed {self.seed}"

    @property
    def group(self) -> str:
        """The name of what cells that differ by seed alone share."""
        return f"{self.attack.label}, {self.tuning.name}, {self.defence.name}"

    def variant(
        self, step: int, settings: FineTuning, rows: Sequence[Row], material: Material, guards: Sequence[Defence] = ()
    ) -> Variant:
        """The cell after `step` steps of a run by `settings` on the attack's `rows`.

        It is held against the undefended cell at the same step (that one against the model before the attack), and
        against its random control where that is one of `guards`. Its columns are those of `records.attack.About`;
        scores are made for the share where the material's store does not hold it.
        """
        run = described(settings)
        # Padding follows from the rows of all seeds, so that another seed would make every cell anew.
        del run["slots"]
        trained_on = data_sha256(self.defence.rows(rows))
        free = dataclasses.replace(self, defence=NONE)
        control = self.defence.control
        held = None if control is None or control not in guards else dataclasses.replace(self, defence=control)
        at = f", step {step}"
        return Variant(
            self.name + at,
            [run, trained_on, self.defence.follows(material), step],
            baseline=before(self.attack).name if self.defence == NONE else free.name + at,
            control=None if held is None else held.name + at,
            group=self.group + at,
            about=plain(
                About(
                    self.attack.label,
                    self.tuning.name,
                    self.defence.name,
                    **self.defence.about,
                    share=self.defence.share(material),
                    step=step,
                    last=step == settings.steps,
                )
            ),
        )


def before(attack: Attack) -> Variant:
    """The model before `attack`."""
    return Variant(f"before {attack.label}", about=plain(About(attack.label, **NONE.about, share=0.0)))


def runs(
    attacks: Sequence[Attack], tunings: Sequence[Tuning], guards: Sequence[Defence], seeds: Sequence[int]
) -> list[list[Cell]]:
    """The cells of the grid by training run: the first of a list is trained, the others act on its weights afterwards.

    Raises ValueError for a defence that takes the run of one that is not in the grid.
    """
    groups: dict[Defence, list[Defence]] = {guard: [guard] for guard in guards if guard.trained_as == guard}
    for guard in guards:
        if guard.trained_as != guard:
            if guard.trained_as not in groups:
                raise ValueError(f"{guard.name!r} acts after a run of {guard.trained_as.name!r}, which is missing")
            groups[guard.trained_as].append(guard)
    return [
        [Cell(attack, tuning, guard, seed) for guard in group]
        for attack in attacks
        for tuning in tunings
        for seed in seeds
        for group in groups.values()
    ]


@dataclasses.dataclass(frozen=True)
class Grid:
    """What all cells share.

    material: what defences are made from; guards: the defences of the grid; every: steps between examinations, 0 for
    none before the end; checkpoints: a folder that all processes see, None to keep none; watch: shows how far a run
    is; tokens: those that runs learn from, counted as they go; adapters: where undefended runs leave the adapters that
    they train, as folders of PEFT, None to leave none; at: further steps that are examined.
    """

    material: Material
    guards: tuple[Defence, ...]
    every: int = 0
    checkpoints: pathlib.Path | None = None
    watch: Watch = unwatched
    tokens: list[Tokens] = dataclasses.field(default_factory=list)
    adapters: pathlib.Path | None = None
    at: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Work:
    """A training run of a study: the first of `cells` is trained on `rows`, the others act on its last weights."""

    study: Study
    cells: Sequence[Cell]
    settings: FineTuning
    rows: Sequence[Row]
    grid: Grid

    @property
    def cell(self) -> Cell:
        """The one that is trained."""
        return self.cells[0]

    @functools.cached_property
    def points(self) -> dict[int, Variant]:
        """What is examined on the way and at the end, by step."""
        every, steps = self.grid.every, range(1, self.settings.steps + 1)
        due = [s for s in steps if s == steps[-1] or s in self.grid.at or (every and s % every == 0)]
        return {step: self._variant(self.cell, step) for step in due}

    @functools.cached_property
    def ends(self) -> dict[Cell, Variant]:
        """What is examined of the other cells."""
        return {cell: self._variant(cell, self.settings.steps) for cell in self.cells[1:]}

    def _variant(self, cell: Cell, step: int) -> Variant:
        return cell.variant(step, self.settings, self.rows, self.grid.material, self.grid.guards)

    @property
    def finished(self) -> bool:
        """Whether all results are there; those that are take their places among the examined."""
        found = [self.study.finished(variant) for variant in (*self.points.values(), *self.ends.values())]
        return all(found)

    def examined_before(self, step: int) -> bool:
        """Whether all that is due before a step is examined."""
        return all(self.study.finished(variant) for number, variant in self.points.items() if number < step)

    @property
    def trained_on(self) -> Sequence[Row]:
        """The rows that the defence leaves."""
        return self.cell.defence.rows(self.rows)

    @property
    def folder(self) -> pathlib.Path | None:
        """Where its checkpoints lie."""
        end = self.study.key(self.points[self.settings.steps])
        return self.grid.checkpoints and self.grid.checkpoints / end[:16]

    def examine(self, step: Step) -> None:
        """Examines what is due at a step of the run, and exports adapters at its end where that is asked."""
        study, cell, grid = self.study, self.cell, self.grid
        mean = sum(len(row.ids) for row in self.trained_on) / max(1, len(self.trained_on))
        grid.tokens.append(Tokens(learned=0 if step.begins else round(self.settings.batch_size * mean)))
        if step.number == self.settings.steps and grid.adapters and cell.tuning.lora and cell.defence == NONE:
            place = grid.adapters / re.sub(r"\W+", "_", cell.name)
            save_peft(place, study.model.config, step.adapters or {}, cell.tuning.lora.alpha, study.model.name)
        variant = self.points.get(step.number)
        if variant is not None and not study.finished(variant):
            if not study.store.has("loss", study.key(variant)):
                study.store.write("loss", study.key(variant), step.loss)
            self._examine(cell, variant, step.weights())

    def examine_ends(self, tuned: Params) -> None:
        """Examines the other cells by the last weights of the run, whose checkpoints then go."""
        for cell, variant in self.ends.items():
            self._examine(cell, variant, tuned)
        if self.folder is not None and jax.process_index() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _examine(self, cell: Cell, variant: Variant, tuned: Params) -> None:
        after = functools.partial(cell.defence.after, tuned, self.grid.material, cell.seed)
        self.study.examine(variant, functools.partial(_made, self.study.model, after))


def examine_run(work: Work) -> dict[str, float | None]:
    """Trains the first cell of a run, examines it on the way, and the others by its last weights.

    What is finished is read instead; an interrupted run goes on from its checkpoints. Returns the training loss by
    variant.
    """
    if not work.finished:
        work.examine_ends(_trained(work))
    study = work.study
    return {variant.name: study.store.read("loss", study.key(variant)) for variant in work.points.values()}


def _trained(work: Work) -> Params:
    """The weights at the end of a run; what is due is examined on the way, with checkpoints kept."""
    model, cell, settings = work.study.model, work.cell, work.settings
    frozen = cell.defence.frozen(work.grid.material, cell.seed)
    run = functools.partial(train, model.config, model.params, work.trained_on, settings, frozen, model.mesh)
    begun = _steps(work, run)
    with work.grid.watch(cell.name, settings.steps) as done, contextlib.closing(begun) as steps:
        for step in steps:
            done(step.number if step.begins else 1)
            work.examine(step)
        return step.weights()


def examine_together(runs: Sequence[Work], most: int) -> None:
    """Trains and examines undefended runs of adapters that differ in seed, rate and rank alone, `most` at a time.

    Their results are left in the store, where `examine_run` finds them; runs that have no like are left to it. An
    interrupted run goes on from its checkpoints, beside those that are at the same step.
    """
    if most < 2:
        return
    # Results take their places among the examined in the order of the grid, whatever is trained with what.
    apart = [dataclasses.replace(run, study=dataclasses.replace(run.study, examined={})) for run in runs]
    alike: dict[tuple[FineTuning, int | None], list[Work]] = {}
    for run in apart:
        if run.settings.lora is not None and run.cell.defence == NONE and not run.finished:
            alike.setdefault((shared(run.settings), _begins(run)), []).append(run)
    for (_, begins), group in alike.items():
        for first in range(0, len(group), most):
            if len(some := group[first : first + most]) > 1:
                _train_together(some, kept=begins is not None)


def _begins(run: Work) -> int | None:
    """The step that a run goes on from, None where one before it is not examined yet, so that it begins anew."""
    latest = latest_step(run.folder)
    return latest if run.examined_before(latest) else None


def _train_together(runs: Sequence[Work], kept: bool) -> None:
    model, steps = runs[0].study.model, runs[0].settings.steps
    trainings = [Training(run.trained_on, run.settings, run.folder if kept else None) for run in runs]
    begun = train_together(model.config, model.params, trainings, model.mesh)
    with runs[0].grid.watch(f"{len(runs)} runs as {runs[0].cell.name}", steps) as done, contextlib.closing(begun):
        for together in begun:
            done(together[0].number if together[0].begins else 1)
            for run, step in zip(runs, together, strict=True):
                run.examine(step)
        for run, step in zip(runs, together, strict=True):
            run.examine_ends(step.weights())


def _steps(work: Work, run: Callable[[pathlib.Path | None], Iterator[Step]]) -> Generator[Step, None, None]:
    """The steps of a run from its latest checkpoint.

    One with a step before there that is not examined yet begins anew, without checkpoints.
    """
    steps = run(work.folder)
    step = next(steps)
    if work.examined_before(step.number):
        yield step
    else:
        del step  # its weights and those of the new run need not fit at once
        steps = run(None)
    yield from steps


def _made(model: ChatModel, weights: Callable[[], Params]) -> ChatModel:
    return model.with_params(weights())
