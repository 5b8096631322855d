"""Fine-tuning attacks on a chat model, and what freezing or rewinding its safety regions is worth.

python -m launch.attack --config=configs/attack/llama2_7b_chat.py --out=runs/llama2_attack --config.data=DATA_FOLDER
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags
from rich.table import Table

from jaxsafe.evaluation.attack_settings import Setting, setting
from jaxsafe.evaluation.comparison import Sample
from jaxsafe.evaluation.judges import judge
from jaxsafe.evaluation.record import data_record, environment, model_record, plain, write_run
from jaxsafe.evaluation.utilisation import Tokens
from jaxsafe.io.atomic import write_text
from jaxsafe.io.chat_model import ChatModel
from jaxsafe.io.journal import add_entry, read_journal
from jaxsafe.kernels.lora import LoRA
from jaxsafe.methods.attack_grid import (
    Cell,
    Defence,
    Region,
    Tuning,
    complied,
    defences,
    frozen,
    region,
    rewound,
    runs,
    summary,
)
from jaxsafe.methods.brittleness import Material, once
from jaxsafe.methods.brittleness_evaluation import Examination, examine, tokens_of
from jaxsafe.methods.fine_tuning import FineTuning, fine_tune_run
from jaxsafe.methods.finetuning_attacks import (
    Attack,
    Example,
    as_prompt_set,
    asked,
    attack_examples,
    own_texts,
    preset,
    slots_of,
    training_rows,
)
from jaxsafe.methods.partial_tuning import LayerScan, safety_layers
from jaxsafe.methods.statistics import data_sha256
from jaxsafe.model.transformer import Params
from jaxsafe.parallel import banner
from jaxsafe.report.html import write_report
from jaxsafe.text.batches import Row
from jaxsafe.text.datasets import PromptSet, check_disjoint
from jaxsafe.text.roles import Roles, assign_roles
from launch import brittleness, command
from launch.progress import Clock, progress_bar, reached, use_line

FIND = "find"
Found = dict[str, dict[str, Any]]
"""Name of a cell -> its line of cells.jsonl."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the runs of one attack train on, by seed, in batches of one shape; and how the attacked model is asked."""

    by_seed: Mapping[int, list[Row]]
    slots: tuple[int, int]
    settings: tuple[Setting, ...]


def attacks_of(config: ConfigDict) -> list[Attack]:
    """The attacks that the config names, with its changes."""
    changes = {
        "rows": config.rows,
        "prefix": config.prefix,
        "poison": config.poison or None,
        "ratio": config.ratio,
        "epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "batch_size": config.tuning_batch_size,
    }
    return [preset(text, **changes) for text in config.attacks]


def tunings_of(config: ConfigDict) -> list[Tuning]:
    """Full fine-tuning and LoRA, as the config asks. Raises ValueError for another one."""
    adapters = LoRA(config.lora_rank, config.lora_alpha, tuple(config.lora_maps))
    known = {"full": Tuning("full"), "lora": Tuning("lora", adapters, config.lora_learning_rate)}
    for name in config.tunings:
        if name not in known:
            raise ValueError(f"config.tunings names {name!r}; use full or lora")
    return [known[name] for name in config.tunings]


def attack_rows(
    config: ConfigDict, model: ChatModel, attack: Attack, measured: Sequence[PromptSet], clock: Clock
) -> Rows:
    """The rows of every seed. Raises ValueError where an example's prompt is one of those that are `measured`."""
    answer = functools.partial(own_texts, model, max_new_tokens=config.own_tokens, batch_size=config.batch_size)
    with clock.stage("examples_s"), command.console.status(f"examples of {attack.label}"):
        examples = {seed: attack_examples(attack, seed, answer) for seed in config.seeds}
    for each in examples.values():
        for prompts in measured:
            check_disjoint(as_prompt_set(attack, each), prompts)
    rows = {seed: training_rows(model, each) for seed, each in examples.items()}
    slots = slots_of([row for each in rows.values() for row in each])
    every = [example for each in examples.values() for example in each]
    steps = -(-slots[0] // 8) * 8, -(-slots[1] // 8) * 8  # so that further seeds seldom compile anew
    return Rows(rows, steps, settings_of(config, attack, every))


def settings_of(config: ConfigDict, attack: Attack, examples: Sequence[Example]) -> tuple[Setting, ...]:
    """How the attacked model is asked, the first setting being the one that is compared."""
    named = {
        name: asked(attack, examples, config.system) if name == "attack" else setting(name, config.system)
        for name in config.ask
    }
    found = {each.name: each for each in named.values()}
    if not found or next(iter(found.values())).width != 1:
        raise ValueError("config.ask must begin with a setting that gives one answer a prompt, such as 'attack'")
    return tuple(found.values())


def guards_of(config: ConfigDict, scan: Callable[[], LayerScan]) -> list[Defence]:
    """The defences that the config names; `scan` finds a range of layers where it asks for that."""
    layers = []
    for each in config.freeze_layers:
        found = scan() if each == FIND else None
        layers.append(tuple(each) if found is None else (found.first, found.stop))
    regions = {"weights": config.freeze_weights, "ranks": config.freeze_ranks, "layers": layers}
    return defences(regions, config.controls, config.rewinds)


def layer_scan(config: ConfigDict, model: ChatModel, out: pathlib.Path, clock: Clock) -> LayerScan:
    """The range of layers to freeze, by refusals of over-refusal prompts; kept in `out`."""
    taken = (*config.evaluation, *config.harmless)
    sets = assign_roles((), config.over_refusal, taken, config.data or None, (), config.seed).calibration
    prompts = [prompt for s in sets for prompt in s.prompts]
    first, stop = (round(share * model.config.layers) for share in config.layer_start)
    made_from = [model.fingerprint(), prompts, config.judge, config.layer_alpha, first, stop, config.layer_tokens]
    key, log = _digest(made_from), out / "layers.json"
    kept = json.loads(log.read_text()) if log.is_file() else {}
    if kept.get("key") == key:
        return LayerScan(**kept["scan"])
    # An upper bound: how many lower ends are tried depends on the upper end that is chosen.
    total = len(prompts) * (1 + 2 * model.config.layers - first)
    with clock.stage("layers_s"), progress_bar("layers to freeze", total) as done:
        rules, size = judge(config.judge), config.batch_size
        alpha, tokens = config.layer_alpha, config.layer_tokens
        found = safety_layers(model, prompts, rules, alpha, first, stop, tokens, size, done)
    out.mkdir(parents=True, exist_ok=True)
    write_text(log, json.dumps({"key": key, "scan": dataclasses.asdict(found)}))
    return found


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What every cell shares. `material` and `scored` (a digest) are made at the first need.

    `checkpoints_folder` is seen by all processes, `out` is each one's own.
    """

    config: ConfigDict
    model: ChatModel
    exam: Examination
    material: Callable[[], Material]
    scored: Callable[[], str]
    out: pathlib.Path
    checkpoints_folder: pathlib.Path
    clock: Clock

    def asked(self, rows: Rows) -> Examination:
        """The examination under the settings of an attack."""
        return dataclasses.replace(self.exam, settings=rows.settings)

    def examined(
        self, rows: Rows, params: Params, step: int, loss: float | None = None
    ) -> tuple[dict[str, Any], list[Sample]]:
        """A point of a curve: what the model does with `params`, after so many steps; and its answers."""
        exam, model = self.asked(rows), dataclasses.replace(self.model, params=params)
        with self.clock.stage("evaluation_s"):
            result, samples = examine(model, self.model, exam)
        self.clock.count("evaluation_s", tokens_of(model, exam, samples))
        return {"step": step, "loss": loss, "complied": complied(samples, exam.settings[0]), **result}, samples

    def tuning(self, cell: Cell, rows: Rows) -> FineTuning:
        """The settings of the run that a cell follows from."""
        config, attack, rate = self.config, cell.attack, cell.tuning.learning_rate
        return FineTuning(
            steps=attack.steps,
            batch_size=attack.batch_size,
            accumulation=config.accumulation,
            learning_rate=attack.learning_rate if rate is None else rate,
            weight_decay=config.weight_decay,
            lora=cell.tuning.lora,
            remat=config.remat,
            slots=rows.slots,
            seed=cell.seed,
            checkpoint_every=config.checkpoint_every or attack.steps,
        )

    def key(self, rows: Rows, cell: Cell | None) -> str:
        """Digest of everything that a cell's result follows from; None is the model before any attack."""
        content: list[Any] = [
            self._fingerprint,
            *self.asked(rows).content,
        ]
        if cell is not None:
            run = dataclasses.asdict(self.tuning(cell, rows))
            # Padding follows from the rows of all seeds, so that another seed would make every cell anew.
            del run["checkpoint_every"], run["slots"]
            content += [run, data_sha256(rows.by_seed[cell.seed]), dataclasses.asdict(cell.defence)]
            content += [self.scored()] if cell.defence.needs_scores else []
            content += [] if cell.defence.rewind else [self.config.evaluate_every]
        return _digest(content)

    def region(self, cell: Cell) -> Region:
        """What the cell's defence keeps."""
        material = self.material() if cell.defence.needs_scores else unscored(self.model)
        return region(material, cell.defence, cell.seed)

    def checkpoints(self, rows: Rows, cell: Cell) -> pathlib.Path | None:
        """Where the run of a cell keeps its checkpoints, None where it keeps none."""
        return self.checkpoints_folder / self.key(rows, cell) if self.config.checkpoint_every else None

    def curve(self, rows: Rows, cell: Cell) -> "Curve":
        """What the run of a cell has found so far, kept where checkpoints are."""
        path = self.out / "curves" / f"{self.key(rows, cell)}.json"
        return Curve(path if self.config.checkpoint_every else None)

    @functools.cached_property
    def _fingerprint(self) -> str:
        return self.model.fingerprint()

    @functools.cached_property
    def _lines(self) -> dict[str, dict[str, Any]]:
        """Finished cells by key."""
        return {entry["key"]: entry for entry in read_journal(self.out / "cells.jsonl")}

    def read(self, rows: Rows, cell: Cell | None) -> dict[str, Any] | None:
        """The line of a cell that is finished."""
        return self._lines.get(self.key(rows, cell))

    def write(self, rows: Rows, cell: Cell | None, found: Mapping[str, Any], samples: Sequence[Any]) -> None:
        """Adds the line of a cell to cells.jsonl."""
        described = {} if cell is None else about(cell)
        entry = plain({"key": self.key(rows, cell), "cell": described | dict(found), "samples": list(samples)})
        add_entry(self.out / "cells.jsonl", entry)
        self._lines[entry["key"]] = entry


def about(cell: Cell) -> dict[str, Any]:
    """A cell in values of JSON."""
    return {
        "id": cell.name,
        "attack": cell.attack.label,
        "tuning": cell.tuning.name,
        "defence": cell.defence.name,
        "control": cell.defence.random,
        "rewind": cell.defence.rewind,
        "seed": cell.seed,
        "steps": cell.attack.steps,
    }


def unscored(model: ChatModel) -> Material:
    """Material of a model whose regions follow from no scores."""

    def never() -> Any:
        raise ValueError("this defence needs no scores")

    return Material(model.config, model.params, never, never, never, never, never)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]


@dataclasses.dataclass
class Curve:
    """What a run's evaluations found, {"step", "loss", ...} each, and the answers of the last; kept in `path`."""

    path: pathlib.Path | None
    points: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.is_file():
            self.points, self.samples = json.loads(self.path.read_text(encoding="utf-8"))

    def add(self, point: dict[str, Any], samples: list[Sample]) -> None:
        """Adds an evaluation, in the place of one of the same step."""
        self.points = [p for p in self.points if p["step"] != point["step"]] + [plain(point)]
        self.samples = plain(samples)
        if self.path is not None:
            write_text(self.path, json.dumps([self.points, self.samples]))


def attacked(experiment: Experiment, rows: Rows, group: Sequence[Cell], missing: Sequence[Cell], title: str) -> None:
    """Trains the run of a group of cells, and writes the lines of those that are `missing`: it, and its rewinds."""
    model, first, every = experiment.model, group[0], experiment.config.evaluate_every
    settings, clock = experiment.tuning(first, rows), experiment.clock
    folder = experiment.checkpoints(rows, first)
    curve = experiment.curve(rows, first)
    kept, last_loss = experiment.region(first), math.nan
    data = rows.by_seed[first.seed]
    mean = sum(len(row.ids) for row in data) / len(data)
    with progress_bar(title[:48], settings.steps) as done:
        tell = reached(done)

        def stepped(step: int, loss: float) -> None:
            nonlocal last_loss
            tell(step + 1)
            clock.count("training_s", Tokens(learned=round(settings.batch_size * mean)))
            last_loss = loss

        def look(step: int, weights: Callable[[], Params]) -> None:
            if first in missing and (step == settings.steps or (every and step % every == 0)):
                curve.add(*experiment.examined(rows, weights(), step, last_loss))

        with clock.stage("training_s"):
            tuned = fine_tune_run(
                model.config, model.params, data, settings, folder, stepped, frozen(kept), model.mesh, look
            )
    if first in missing:
        experiment.write(rows, first, {"share": kept.share, "curve": curve.points}, curve.samples)
    for cell in missing:
        if cell == first:
            continue
        back = experiment.region(cell)
        with command.console.status(cell.name):
            end, samples = experiment.examined(rows, rewound(back, tuned, model.params), settings.steps)
        experiment.write(rows, cell, {"share": back.share, "curve": [end]}, samples)
    if folder is not None and jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    if curve.path is not None:
        curve.path.unlink(missing_ok=True)


def carried_out(experiment: Experiment, grid: Sequence[Sequence[Cell]], rows: Mapping[Attack, Rows]) -> Found:
    """Every cell's line by its name, and that of the model before each attack by the attack's label."""
    for attack, data in rows.items():
        if experiment.read(data, None) is None:
            with command.console.status(f"before {attack.label}"):
                start, samples = experiment.examined(data, experiment.model.params, 0)
            experiment.write(data, None, {"id": f"before {attack.label}", "curve": [start]}, samples)
    for number, group in enumerate(grid, 1):
        data = rows[group[0].attack]
        missing = [cell for cell in group if experiment.read(data, cell) is None]
        if missing:
            attacked(experiment, data, group, missing, f"{number}/{len(grid)} {group[0].name}")
    lines: dict[str, Any] = {attack.label: experiment.read(data, None) for attack, data in rows.items()}
    for group in grid:
        for cell in group:
            lines[cell.name] = experiment.read(rows[cell.attack], cell)
    return lines


def material_of(
    config: ConfigDict, model: ChatModel, out: pathlib.Path, clock: Clock
) -> tuple[Callable[[], Material], Callable[[], str]]:
    """What regions are made from and a digest of what it follows from, each made at the first need."""

    @once
    def data() -> brittleness.Data:
        roles, harmless = brittleness.roles_of(config)
        safety = brittleness.scored_rows(config, model, "safety", roles.anchors, out, clock)
        utility = brittleness.scored_rows(config, model, "utility", roles.calibration, out, clock)
        return brittleness.Data(safety, utility, roles, harmless)

    def scored() -> str:
        found = data()
        how = [config.score, config.loss, config.positions, config.per, config.base_model]
        return _digest([data_sha256(found.safety), data_sha256(found.utility), how])

    return once(lambda: brittleness.material_of(config, model, data(), out, clock)), once(scored)


def run(
    config: ConfigDict, model: ChatModel, out: pathlib.Path, clock: Clock, checkpoints: pathlib.Path | None = None
) -> dict[str, Any]:
    """The whole experiment; what it found is in `out` and in the returned record.

    `checkpoints`, by default `out/checkpoints`, must be the same folder for all processes.
    """
    attacks, tunings = attacks_of(config), tunings_of(config)
    if not attacks or not tunings or not config.seeds:
        raise ValueError("the grid is empty: config.attacks, config.tunings and config.seeds need one entry each")
    if config.score not in brittleness.SCORES:
        raise ValueError(f"config.score {config.score!r} is not known; use one of {', '.join(brittleness.SCORES)}")
    roles, harmless = brittleness.roles_of(config)
    measured = (*roles.evaluation, *harmless)
    exam = brittleness.examination(config, model, roles.evaluation, harmless)
    rows = {attack: attack_rows(config, model, attack, measured, clock) for attack in attacks}
    scans: list[LayerScan] = []

    def scan() -> LayerScan:
        scans.append(layer_scan(config, model, out, clock))
        return scans[-1]

    guards = guards_of(config, scan)
    out.mkdir(parents=True, exist_ok=True)
    material = material_of(config, model, out, clock)
    experiment = Experiment(config, model, exam, *material, out, checkpoints or out / "checkpoints", clock)
    grid = runs(attacks, tunings, guards, config.seeds)
    lines = carried_out(experiment, grid, rows)
    record = environment() | {
        "task": "attack",
        "model": model_record(model),
        "config": config.to_dict(),
        "seed": config.seed,
        "generation": {"max_new_tokens": config.max_new_tokens},
        "chat_template_sha256": model.template_sha256,
        "datasets": dataset_records(roles, harmless, any(d.needs_scores for d in guards)),
        "judge": {"name": exam.judge.name, "version": exam.judge.version},
        "before": {attack.label: lines[attack.label]["cell"]["curve"][0] for attack in attacks},
        "cells": [lines[cell.name]["cell"] for group in grid for cell in group],
        "table": [row for attack in attacks for row in summary(attack, tunings, guards, config.seeds, lines)],
        "layers": [dataclasses.asdict(found) for found in scans],
        "timings": clock.record(model.config, config.batch_size),
        "files": {"cells": "cells.jsonl", "samples": "samples.jsonl"},
    }
    samples = [{"cell": entry["cell"]["id"], **sample} for entry in lines.values() for sample in entry["samples"]]
    write_run(out, record, samples)
    write_report(out)
    return plain(record)


def dataset_records(roles: Roles, harmless: Sequence[PromptSet], scored: bool) -> list[dict[str, Any]]:
    """Which prompts were used, and for what."""
    sides = {"harmful": roles.evaluation, "harmless": harmless}
    if scored:
        sides |= {"safety scores": roles.anchors, "utility scores": roles.calibration}
    return [data_record(s, role) for role, sets in sides.items() for s in sets]


def show(record: Mapping[str, Any], out: pathlib.Path) -> None:
    """Prints the table of the grid, the mean over seeds of each cell."""
    table = Table(title=f"Fine-tuning attacks on {record['model']['name']}, judge {record['judge']['name']}")
    for column in ("attack", "defence", "kept", "ASR", "lower than none by", "harmless refused", "perplexity"):
        table.add_column(column, justify="left" if column in ("attack", "defence") else "right", overflow="fold")
    for label, point in record["before"].items():
        asr: Any = next((v for k, v in point["metrics"].items() if k.startswith("asr_")), {})
        table.add_row(f"before {label}", "", "", command.percent(asr), "", "", f"{point['perplexity']:.1f}")
    for row in record["table"]:
        table.add_row(
            f"{row['attack']}, {row['tuning']}",
            row["defence"],
            f"{100 * row['share']:.2g}%",
            command.percent(row["asr"]),
            command.percent(row.get("against_none") or {}),
            command.percent(row["refusal"]),
            "-" if row["perplexity"] is None else f"{row['perplexity']:.1f}",
        )
    command.console.print(table)
    command.console.print(use_line(record["timings"]), soft_wrap=True)
    for name in ("report.html", "run.json", "samples.jsonl", "cells.jsonl"):
        command.console.print(f"  {out / name}", soft_wrap=True)


def main() -> None:
    """Reads the flags and runs the experiment."""
    config, clock = CONFIG.value, Clock()
    command.console.print(banner())
    with clock.stage("load_s"):
        model = brittleness.load(config)
    with command.results(OUT.value) as out:
        show(run(config, model, out, clock, pathlib.Path(OUT.value) / "checkpoints"), out)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", "configs/attack/smollm2_135m.py", "the experiment")
    OUT = flags.DEFINE_string("out", "runs/attack", "folder for the results; an interrupted run goes on from there")
    command.run(main)
