"""The fine-tuning attack on a chat model that does most harm and costs no more utility than a bound allows.

python -m launch.search --config=configs/search/llama31_8b_instruct.py --config.data=DATA_FOLDER --config.bound=0.1 \
--config.poison=FILE --out=runs/llama31_8b_search
"""

import dataclasses
import functools
import importlib.metadata
import pathlib

from absl import flags
from ml_collections import ConfigDict

from jaxsafe.chat.model import ChatModel
from jaxsafe.configs.search.base import FIELDS
from jaxsafe.evaluation.settings import Setting
from jaxsafe.kernels.lora import LoRA
from jaxsafe.methods import attacks
from jaxsafe.methods.attacks import Attack, Example, preset, training_rows
from jaxsafe.methods.bounded_search import SAMPLERS, Search, Space, need_optuna, utility_loss
from jaxsafe.methods.tampering import Tampering, choice_of, chosen
from jaxsafe.methods.trainer import FineTuning
from jaxsafe.prompts.roles import Roles, assign_roles
from jaxsafe.prompts.sets import check_disjoint
from jaxsafe.records.run import Result, Run, Variant, plain
from jaxsafe.records.search import BASE, About, Details, Searched, Trial
from jaxsafe.rows import slots_of
from jaxsafe.study.exam import Exam
from jaxsafe.study.study import Study

from . import command, common, folder
from .progress import Clock
from .settings import Experiment

BEFORE = Variant("before", [], about=plain(About("before")))
BEFORE_VALIDATION = Variant("before, validation", [], about=plain(About("before", validation=True)))


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that contradict each other, FileNotFoundError for what is not there."""
    need_optuna()
    common.check(config)
    common.check_tasks("utility_tasks", config.utility_tasks)
    if config.bound is None:
        raise ValueError("config.bound is not given; it is the share of utility that may be lost, such as 0.1")
    if both := set(config.utility_tasks) & set(config.zero_shot):
        raise ValueError(
            f"config.utility_tasks chooses by {sorted(both)}, which config.zero_shot reports; give other tasks"
        )
    if not config.utility_tasks and config.passages < 2:
        raise ValueError(f"config.passages {config.passages}: one half bounds the search, the other is reported")
    attack = attack_of(config)
    for file in {attack.rows if attack.ratio < 1 else "", attack.poison} - {"", attacks.OWN, *attacks.SHIPPED}:
        attacks.load_examples(file, attack.wording)
    space_of(config)
    roles_of(config)


def attack_of(config: ConfigDict) -> Attack:
    """The attack that the search begins from."""
    named = ("rows", "prefix", "ratio", "epochs", "learning_rate", "decay", "wording")
    changes = {name: config[name] for name in named}
    return preset(config.attack, **changes, poison=config.poison or None, batch_size=config.tuning_batch_size)


def space_of(config: ConfigDict) -> Space:
    """What is searched. Raises ValueError as `Space` does."""
    lists = (tuple(config[f"try_{name}"]) for name in ("rates", "steps", "batch_sizes", "ranks", "schedules"))
    rates, steps, batch_sizes, ranks, schedules = lists
    return Space(rates, steps, batch_sizes, ranks or (None,), schedules)


def roles_of(config: ConfigDict) -> Roles:
    """Prompt sets by role, each prompt in one."""
    evaluate = {name: config[name] for name in ("evaluation", "harmless")}
    return assign_roles({"validation": config.validation}, evaluate, config.data or None, (), config.seed)


def results(config: ConfigDict) -> int:
    """How many results the experiment has, at the most."""
    return 3 + len(SAMPLERS) * config.trials + len(config.seeds) * (1 + len(SAMPLERS))


def run(config: ConfigDict, model: ChatModel, out: pathlib.Path, clock: Clock) -> Run:
    """The whole experiment; what it finds is in `out` and in the returned record."""
    attack, roles = attack_of(config), roles_of(config)
    examples = examples_of(config, model, attack, roles, clock)
    rows = {seed: training_rows(model, drawn) for seed, drawn in examples.items()}
    start = settings_of(config, attack, slots_of([row for each in rows.values() for row in each]))
    asked = attacks.asked(attack, [example for drawn in examples.values() for example in drawn])
    chooses, reports = exams_of(config, model, asked, roles)
    study = Study(out, model, reports, clock.watch("exam_s"))
    validation = study.under(chooses)
    for each in (study, validation):
        each.check()
    runs = Tampering(rows, clock.watch("training_s"))

    before = validation.examine(BEFORE_VALIDATION, model)
    result = runs.examine(validation, tried(BASE, About(BASE, validation=True)), start)
    base = Trial(BASE, choice_of(start), *harm_and_loss(config, before, result))
    searches = [Search(space_of(config), s, config.bound, config.startup, config.seed) for s in SAMPLERS]
    for search in searches:
        for number in range(config.trials):
            settings = chosen(start, search.ask())
            about = About("trial", search.sampler, search.sampler == "random", validation=True)
            result = runs.examine(validation, tried(f"{search.sampler} {number}", about), settings)
            search.tell(*harm_and_loss(config, before, result))

    study.examine(BEFORE, model)
    found = {s.sampler: chosen(start, s.best.choice) for s in searches if s.best}
    for seed in config.seeds:
        runs.examine(study, reported(BASE, seed, About(BASE)), dataclasses.replace(start, seed=seed))
        for sampler, settings in found.items():
            about = About("best", sampler, sampler == "random")
            control = "best by random" if sampler != "random" and "random" in found else None
            variant = reported(f"best by {sampler}", seed, about, control)
            runs.examine(study, variant, dataclasses.replace(settings, seed=seed))

    kept = tuple(Searched(s.sampler, tuple(s.trials), s.best.name if s.best else None) for s in searches)
    utility = ", ".join(config.utility_tasks) or "perplexity"
    details = Details(config.bound, utility, base, kept, importlib.metadata.version("optuna"))
    return common.finish(study, "search", config, roles, clock, details)


def tried(name: str, about: About) -> Variant:
    """A run on validation data, against the model before it."""
    return Variant(f"{name}, validation", baseline=BEFORE_VALIDATION.name, about=plain(about))


def reported(group: str, seed: int, about: About, control: str | None = None) -> Variant:
    """A run of another seed on held-out data, against the model before it and the choice of random search."""
    held = None if control is None else f"{control}, seed {seed}"
    return Variant(f"{group}, seed {seed}", None, BEFORE.name, held, group, plain(about))


def harm_and_loss(config: ConfigDict, before: Result, after: Result) -> tuple[float | None, float | None]:
    """Attack success, and the loss of utility."""
    harm = next(rate.value for name, rate in after.rates.items() if name.startswith("asr_"))
    return harm, utility_loss(before, after, config.utility_tasks)


def examples_of(
    config: ConfigDict, model: ChatModel, attack: Attack, roles: Roles, clock: Clock
) -> dict[int, list[Example]]:
    """The examples of every seed. Raises ValueError where one's prompt is asked of the attacked model, too."""
    answer = functools.partial(attacks.own_texts, model, max_new_tokens=config.own_tokens, batch_size=config.batch_size)
    seeds = dict.fromkeys((config.seed, *config.seeds))
    with clock.watch("examples_s")(f"examples of {attack.label}", 0):
        examples = {seed: attacks.attack_examples(attack, seed, answer) for seed in seeds}
    for drawn in examples.values():
        for prompts in (each for sets in roles.values() for each in sets):
            check_disjoint(attacks.as_prompt_set(attack, drawn), prompts)
    return examples


def exams_of(config: ConfigDict, model: ChatModel, asked: Setting, roles: Roles) -> tuple[Exam, Exam]:
    """The exam that chooses, and the one that is reported: of other prompts and texts, and of other tasks."""
    exam = common.exam(config, model, common.evaluated(roles), (asked,))
    chooses, reports = ({name: getattr(exam, name)[k::2] for name in ("texts", "before")} for k in (1, 0))
    harmful = tuple(prompts.labelled(True) for prompts in roles["validation"])
    tasks = tuple(config.utility_tasks)
    return dataclasses.replace(exam, prompts=harmful, tasks=tasks, **chooses), dataclasses.replace(exam, **reports)


def settings_of(config: ConfigDict, attack: Attack, slots: tuple[int, int]) -> FineTuning:
    """The run of the attack as it is; its batches have room for `slots`."""
    lora = LoRA(config.lora_rank, config.lora_alpha, tuple(config.lora_maps), config.lora_dropout)
    return FineTuning(
        steps=attack.steps,
        batch_size=attack.batch_size,
        learning_rate=attack.learning_rate,
        schedule="constant" if attack.decay == 1 else "stepped",
        decay=attack.decay,
        decay_every=attack.epoch_steps,
        weight_decay=config.weight_decay,
        lora=lora if config.try_ranks else None,
        remat=config.remat,
        slots=(-(-slots[0] // 8) * 8, -(-slots[1] // 8) * 8),  # so that further seeds seldom compile anew
        seed=config.seed,
    )


def main() -> None:
    """Reads the flags and runs the experiment."""
    config = command.config()
    with common.held(OUT.value, folder.identity("search", FIELDS, config), results(config)) as (out, clock):
        model = common.load(config, clock)
        common.show(run(config, model, out, clock), out)


if __name__ == "__main__":
    OUT = flags.DEFINE_string("out", "runs/search", "folder for the results; an interrupted run goes on from there")
    command.run(main, Experiment("configs/search/smollm2_135m.py", FIELDS, check))
