"""Fine-tuning attacks on a chat model, and what freezing or rewinding its safety regions is worth.

python -m launch.attack --config=configs/attack/llama2_7b_chat.py --out=runs/llama2_attack --config.data=DATA_FOLDER
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict

from jaxsafe.chat.model import ChatModel
from jaxsafe.configs.attack.base import FIELDS
from jaxsafe.evaluation.judges.keyword import judge
from jaxsafe.evaluation.settings import Setting
from jaxsafe.kernels.lora import LoRA
from jaxsafe.methods import attacks
from jaxsafe.methods.attacks import Attack, Example, preset, training_rows
from jaxsafe.methods.brittleness import SIDES
from jaxsafe.methods.cells import Cell, Grid, Tuning, Work, before, examine_run, examine_together, runs
from jaxsafe.methods.defences import Defence, Keep, defences
from jaxsafe.methods.layer_scan import ScanSettings, safety_layers_once
from jaxsafe.methods.trainer import FineTuning
from jaxsafe.model.layers import LayerRange
from jaxsafe.prompts.roles import Roles, assign_roles
from jaxsafe.prompts.sets import check_disjoint
from jaxsafe.records.attack import Details, LayerScan
from jaxsafe.records.run import Run
from jaxsafe.rows import slots_of
from jaxsafe.study.study import Study

from . import command, common, folder
from .progress import Clock
from .settings import Experiment

FIND = "find"


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that contradict each other, FileNotFoundError for what is not there."""
    common.check(config)
    tunings_of(config)
    chosen = attacks_of(config)
    if config.poison and not any(attack.ratio for attack in chosen):
        raise ValueError("config.poison is given, but no attack takes a share of it; give config.ratio, or 'poisoned'")
    if config.base_model and config.score != "weight_difference":
        raise ValueError(f"config.base_model does nothing under config.score {config.score!r}; leave it out")
    if config.export_adapter and ("lora" not in config.tunings or config.adapter):
        trained = "config.adapter is merged before" if config.adapter else f"config.tunings are {config.tunings}"
        raise ValueError(f"config.export_adapter writes adapters of config.model that were trained, but {trained}")
    if config.lora_sweep and "lora" not in config.tunings:
        raise ValueError(f"config.lora_sweep is of adapters, but config.tunings are {config.tunings}; add 'lora'")
    for attack in chosen:
        if attack.steps < max(config.evaluate_at, default=0):
            due = f"config.evaluate_at {config.evaluate_at}"
            raise ValueError(f"{due}: {attack.label} trains for {attack.steps} steps; give more config.epochs")
        if attack.batch_size % config.accumulation:
            parts = f"config.accumulation {config.accumulation} does not divide"
            raise ValueError(f"{parts} batches of {attack.batch_size} ({attack.label})")
        for file in {attack.rows if attack.ratio < 1 else "", attack.poison} - {"", attacks.OWN, *attacks.SHIPPED}:
            attacks.load_examples(file, attack.wording)
    if FIND in config.freeze_layers:
        start_of(config, 100)
    common.check_scored(config)


def results(config: ConfigDict) -> int:
    """How many results the experiment has: of each attack the model before it, and the due steps of its runs."""
    regions = len(config.freeze_weights) + len(config.freeze_ranks) + len(config.freeze_layers)
    kept, runs = regions * (1 + config.controls), len(tunings_of(config)) * len(config.seeds)
    due = [_due(config, attack.steps) for attack in attacks_of(config)]
    return sum(1 + runs * ((1 + kept) * steps + kept * config.rewinds) for steps in due)


def _due(config: ConfigDict, steps: int) -> int:
    """How many of so many steps are examined."""
    every = range(config.evaluate_every, steps, config.evaluate_every) if config.evaluate_every else ()
    return len({*every, *config.evaluate_at, steps})


def start_of(config: ConfigDict, layers: int) -> LayerRange:
    """Where the scan of so many `layers` begins. Raises ValueError for an empty range."""
    return LayerRange(*(round(share * layers) for share in config.layer_start))


def run(
    config: ConfigDict, model: ChatModel, out: pathlib.Path, clock: Clock, checkpoints: pathlib.Path | None = None
) -> Run:
    """The whole experiment; what it finds is in `out` and in the returned record.

    `checkpoints`, by default `out/checkpoints`, must be the same folder for all processes.
    """
    chosen, tunings = attacks_of(config), tunings_of(config)
    common.check_ranks(config, ["freeze_ranks"], model)
    for each in config.freeze_layers:
        if each != FIND:
            LayerRange.parse(each).within(model.config.layers)
    roles = common.scored_roles(config)
    examples = {attack: examples_of(config, model, attack, roles, clock) for attack in chosen}
    settings = {attack: settings_of(config, attack, examples[attack]) for attack in chosen}
    exam = common.exam(config, model, common.evaluated(roles), settings[chosen[0]])
    study = Study(out, model, exam, clock.watch("exam_s"))
    studies = {attack: study.under(dataclasses.replace(exam, settings=settings[attack])) for attack in chosen}
    for each in studies.values():
        each.check()
    material = common.material(config, model, roles, study.store, clock)
    guards, scans = guards_of(config, model, study, clock)
    folder = (checkpoints or out / "checkpoints") if config.checkpoint_every else None
    adapters = out / "adapters" if config.export_adapter else None
    watch, at = clock.watch("training_s"), tuple(config.evaluate_at)
    grid = Grid(material, tuple(guards), config.evaluate_every, folder, watch, adapters=adapters, at=at)

    losses: dict[str, float | None] = {}
    for attack in chosen:
        rows = {seed: training_rows(model, drawn) for seed, drawn in examples[attack].items()}
        slots = slots_of([row for each in rows.values() for row in each])
        studies[attack].examine(before(attack), model)
        work = [
            Work(studies[attack], cells, training_of(config, cells[0], slots), rows[cells[0].seed], grid)
            for cells in runs([attack], tunings, guards, config.seeds)
        ]
        examine_together(work, config.lora_together)
        for each in work:
            losses |= examine_run(each)

    for tokens in grid.tokens:
        clock.count("training_s", tokens)
    scored = any(isinstance(guard, Keep) and guard.point is not None for guard in guards)
    used = {role: sets for role, sets in roles.items() if scored or role not in SIDES}
    return common.finish(study, "attack", config, used, clock, Details(tuple(scans), losses))


def attacks_of(config: ConfigDict) -> list[Attack]:
    """The attacks that the config names, with its changes."""
    changes = {
        name: config[name] for name in ("rows", "prefix", "ratio", "epochs", "learning_rate", "decay", "wording")
    }
    changes |= {"poison": config.poison or None, "batch_size": config.tuning_batch_size}
    return [preset(text, **changes) for text in config.attacks]


def tunings_of(config: ConfigDict) -> list[Tuning]:
    """Full fine-tuning and LoRA, as the config asks, and behind them the sweep of LoRA."""
    adapters = LoRA(config.lora_rank, config.lora_alpha, tuple(config.lora_maps), config.lora_dropout)
    known = {"full": Tuning("full"), "lora": Tuning("lora", adapters, config.lora_learning_rate)}
    swept = [
        Tuning(f"lora r={rank} rate={rate:g}", dataclasses.replace(adapters, rank=rank), rate)
        for rank, rate in config.lora_sweep
    ]
    return [known[name] for name in config.tunings] + swept


def examples_of(
    config: ConfigDict, model: ChatModel, attack: Attack, roles: Roles, clock: Clock
) -> dict[int, list[Example]]:
    """The examples of every seed. Raises ValueError where one's prompt is evaluated, too."""
    answer = functools.partial(attacks.own_texts, model, max_new_tokens=config.own_tokens, batch_size=config.batch_size)
    with clock.watch("examples_s")(f"examples of {attack.label}", 0):
        examples = {seed: attacks.attack_examples(attack, seed, answer) for seed in config.seeds}
    for drawn in examples.values():
        for prompts in common.evaluated(roles):
            check_disjoint(attacks.as_prompt_set(attack, drawn), prompts)
    return examples


def settings_of(config: ConfigDict, attack: Attack, examples: Mapping[int, Sequence[Example]]) -> tuple[Setting, ...]:
    """How the attacked model is asked: "attack" stands for the persona of the attack's examples, where it has one."""
    persona = attacks.asked(attack, [example for drawn in examples.values() for example in drawn])
    named = [persona if name == common.PERSONA else common.setting_of(config, name) for name in config.settings]
    return tuple({setting.name: setting for setting in named}.values())


def training_of(config: ConfigDict, cell: Cell, slots: tuple[int, int]) -> FineTuning:
    """The settings of the run of a cell, whose batches have room for `slots`."""
    attack, rate = cell.attack, cell.tuning.learning_rate
    return FineTuning(
        steps=attack.steps,
        batch_size=attack.batch_size,
        accumulation=config.accumulation,
        learning_rate=attack.learning_rate if rate is None else rate,
        schedule="constant" if attack.decay == 1 else "stepped",
        decay=attack.decay,
        decay_every=attack.epoch_steps,
        weight_decay=config.weight_decay,
        lora=cell.tuning.lora,
        remat=config.remat,
        slots=(-(-slots[0] // 8) * 8, -(-slots[1] // 8) * 8),  # so that further seeds seldom compile anew
        seed=cell.seed,
        checkpoint_every=config.checkpoint_every or attack.steps,
    )


def guards_of(
    config: ConfigDict, model: ChatModel, study: Study, clock: Clock
) -> tuple[list[Defence], list[LayerScan]]:
    """The defences that the config names, and the scans for the ranges of layers that it leaves to be found."""
    scans = [layer_scan(config, model, study, clock) for each in config.freeze_layers if each == FIND]
    found = iter(scans)
    layers = [(next(found).layers if each == FIND else LayerRange.parse(each)) for each in config.freeze_layers]
    ranges = [(each.first, each.stop) for each in layers]
    regions = {"weights": config.freeze_weights, "ranks": config.freeze_ranks, "layers": ranges}
    return defences(regions, config.controls, config.rewinds), scans


def layer_scan(config: ConfigDict, model: ChatModel, study: Study, clock: Clock) -> LayerScan:
    """The range of layers to freeze, by refusals of over-refusal prompts; kept in the store."""
    evaluate = {"evaluation": config.evaluation, "harmless": config.harmless}
    sets = assign_roles({"scan": config.over_refusal}, evaluate, config.data or None, (), config.seed)["scan"]
    prompts = [prompt for each in sets for prompt in each.prompts]
    start = start_of(config, model.config.layers)
    how = ScanSettings(start, config.layer_alpha, config.layer_tokens, config.batch_size)
    # An upper bound: how many lower ends are tried depends on the upper end that is chosen.
    total = len(prompts) * (1 + 2 * model.config.layers - start.first)
    with clock.watch("layers_s")("layers to freeze", total) as done:
        return safety_layers_once(study.store, model, prompts, judge(config.judge), how, done)


def main() -> None:
    """Reads the flags and runs the experiment."""
    config = command.config()
    with common.held(OUT.value, folder.identity("attack", FIELDS, config), results(config)) as (out, clock):
        model = common.load(config, clock)
        common.show(run(config, model, out, clock, pathlib.Path(OUT.value) / "checkpoints"), out)


if __name__ == "__main__":
    OUT = flags.DEFINE_string("out", "runs/attack", "folder for the results; an interrupted run goes on from there")
    command.run(main, Experiment("configs/attack/smollm2_135m.py", FIELDS, check))
