"""Cells of a grid of attacked models, and training runs that are examined as they go."""

import contextlib
import dataclasses
import functools
import pathlib
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import jax

from jaxsafe.chat.model import ChatModel
from jaxsafe.evaluation.utilisation import Tokens
from jaxsafe.io.peft import save_peft
from jaxsafe.kernels.lora import LoRA
from jaxsafe.methods.attacks import Attack
from jaxsafe.methods.brittleness import Material
from jaxsafe.methods.defences import NONE, Defence
from jaxsafe.methods.trainer import FineTuning, Step, train
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
        run = dataclasses.asdict(settings)
        # Padding follows from the rows of all seeds, so that another seed would make every cell anew.
        del run["checkpoint_every"], run["slots"]
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
    they train, as folders of PEFT; None to leave none.
    """

    material: Material
    guards: tuple[Defence, ...]
    every: int = 0
    checkpoints: pathlib.Path | None = None
    watch: Watch = unwatched
    tokens: list[Tokens] = dataclasses.field(default_factory=list)
    adapters: pathlib.Path | None = None


def examine_run(
    study: Study, cells: Sequence[Cell], settings: FineTuning, rows: Sequence[Row], grid: Grid
) -> dict[str, float | None]:
    """Trains the first of `cells` on `rows`, examines it on the way, and the others by its last weights.

    What is finished is read instead; an interrupted run goes on from its checkpoints. Returns the training loss by
    variant.
    """
    due = [s for s in range(1, settings.steps + 1) if s == settings.steps or (grid.every and s % grid.every == 0)]
    of = functools.partial(Cell.variant, settings=settings, rows=rows, material=grid.material, guards=grid.guards)
    points = {step: of(cells[0], step) for step in due}
    ends = {cell: of(cell, settings.steps) for cell in cells[1:]}
    finished = [study.finished(variant) for variant in (*points.values(), *ends.values())]
    if not all(finished):
        folder = grid.checkpoints and grid.checkpoints / study.key(points[settings.steps])[:16]
        tuned = _trained(study, cells[0], settings, cells[0].defence.rows(rows), (points, folder), grid)
        for cell, variant in ends.items():
            after = functools.partial(cell.defence.after, tuned, grid.material, cell.seed)
            study.examine(variant, functools.partial(_made, study.model, after))
        if folder is not None and jax.process_index() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return {variant.name: study.store.read("loss", study.key(variant)) for variant in points.values()}


def _trained(
    study: Study,
    cell: Cell,
    settings: FineTuning,
    rows: Sequence[Row],
    due: tuple[Mapping[int, Variant], pathlib.Path | None],
    grid: Grid,
) -> Params:
    """The weights at the end of a cell's run; what is `due`, by step, is examined on the way, with checkpoints kept."""
    model, (points, folder) = study.model, due
    frozen = cell.defence.frozen(grid.material, cell.seed)
    run = functools.partial(train, model.config, model.params, rows, settings, frozen, model.mesh)
    learned = round(settings.batch_size * sum(len(row.ids) for row in rows) / max(1, len(rows)))
    with grid.watch(cell.name, settings.steps) as done, contextlib.closing(_steps(study, run, folder, points)) as steps:
        for step in steps:
            done(step.number if step.begins else 1)
            grid.tokens.append(Tokens(learned=0 if step.begins else learned))
            if step.number == settings.steps and grid.adapters and cell.tuning.lora and cell.defence == NONE:
                place = grid.adapters / re.sub(r"\W+", "_", cell.name)
                save_peft(place, model.config, step.adapters or {}, cell.tuning.lora.alpha, model.name)
            variant = points.get(step.number)
            if variant is not None and not study.finished(variant):
                if not study.store.has("loss", study.key(variant)):
                    study.store.write("loss", study.key(variant), step.loss)
                after = functools.partial(cell.defence.after, step.weights(), grid.material, cell.seed)
                study.examine(variant, functools.partial(_made, model, after))
        return step.weights()


def _steps(
    study: Study,
    run: Callable[[pathlib.Path | None], Iterator[Step]],
    folder: pathlib.Path | None,
    points: Mapping[int, Variant],
) -> Generator[Step, None, None]:
    """The steps of a run from its latest checkpoint in `folder`.

    One with a step before there that is not examined yet begins anew, without checkpoints.
    """
    steps = run(folder)
    step = next(steps)
    if all(study.finished(variant) for number, variant in points.items() if number < step.number):
        yield step
    else:
        del step  # its weights and those of the new run need not fit at once
        steps = run(None)
    yield from steps


def _made(model: ChatModel, weights: Callable[[], Params]) -> ChatModel:
    return model.with_params(weights())
