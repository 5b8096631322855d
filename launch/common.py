"""What launch scripts have in common: a model, an exam, and what scores are made from, out of a config."""

import contextlib
import dataclasses
import importlib.util
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from jaxsafe.chat.model import ChatModel, load_chat_model
from jaxsafe.chat.tokenizer import template_args
from jaxsafe.configs.published import TABLES
from jaxsafe.devices import multiplies_bfloat16
from jaxsafe.evaluation.judges.keyword import judge
from jaxsafe.evaluation.language import Reading, builtin_prose, load_passages, text_rows
from jaxsafe.evaluation.settings import Setting, load_suffixes, setting
from jaxsafe.evaluation.windows import PROTOCOLS, Windows, load_text, windows
from jaxsafe.evaluation.zero_shot import LM_EVAL_03, Shuffled
from jaxsafe.io.hub import Adapted, Named
from jaxsafe.io.store import Store
from jaxsafe.kernels.sampling import Decoding, Sampling
from jaxsafe.methods.attribution_data import (
    OwnAnswers,
    draw,
    kept_count,
    own_answers_once,
    pairs_from_file,
    prompts_of_pairs,
)
from jaxsafe.methods.brittleness import SIDES, Material, ScoreSettings
from jaxsafe.parallel import banner
from jaxsafe.prompts.roles import Roles, assign_roles, check_unseen
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.records.run import PublishedTable, Run, Scored
from jaxsafe.report.terminal import result_table, scored_lines
from jaxsafe.rows import Row
from jaxsafe.study.exam import Exam
from jaxsafe.study.record import data_records, record, timed, write_run
from jaxsafe.study.study import Study

from . import command, folder
from .accelerator import unused_here
from .progress import Clock, use_line

PERSONA = "attack"
"""In config.settings of an attack: as the persona of its examples."""


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings of model and exam that contradict each other, FileNotFoundError for files."""
    if not config.model:
        raise ValueError("config.model is empty; give a folder, a GGUF file or a hub name")
    for name in ("chat_template", "template_args", "system"):
        if config.raw and config[name]:
            raise ValueError(f"config.raw asks prompts without a template, so config.{name} would do nothing; give one")
    if "settings" in config:
        check_settings(config)
    if config.text:
        load_text(config.text) if config.reading in PROTOCOLS else load_passages(config.text, config.passages)
    if config.window and config.reading not in PROTOCOLS:
        raise ValueError(f"config.window {config.window} does nothing under config.reading {config.reading!r}")
    check_tasks("zero_shot", config.get("zero_shot", ()))


def check_tasks(name: str, tasks: Sequence[str]) -> None:
    """Raises ValueError where the field `name` has `tasks` and lm-eval is not there."""
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f'config.{name} {tuple(tasks)} needs lm-eval: pip install "jaxsafe[eval]"')


def check_settings(config: ConfigDict) -> None:
    """Raises ValueError for settings of asking that contradict each other."""
    if config.suffixes and "suffix" not in config.settings:
        raise ValueError(f"config.suffixes is given, but config.settings {config.settings} has no 'suffix'")
    named = [setting_of(config, name) for name in config.settings if name != PERSONA]
    if config.settings[0] != PERSONA and named[0].width != 1:
        raise ValueError(
            f"config.settings must begin with one answer a prompt, as 'vanilla'; got {config.settings[0]!r}"
        )


def check_scored(config: ConfigDict) -> None:
    """Raises ValueError for settings of scores that contradict each other, FileNotFoundError for files."""
    score_settings(config)
    files = [config[f"{side}_pairs"] for side in SIDES if config[f"{side}_pairs"]]
    if config.raw_pairs and not files:
        raise ValueError("config.raw_pairs is for config.safety_pairs and config.utility_pairs; neither is given")
    if config.score == "weight_difference" and not config.base_model:
        raise ValueError("config.score 'weight_difference' needs config.base_model, the model before its alignment")
    if config.get("use_diff") and not config.base_model:
        raise ValueError("config.use_diff needs config.base_model, the model before its alignment")
    scored_roles(config)


def check_ranks(config: ConfigDict, names: Sequence[str], model: ChatModel) -> None:
    """Raises ValueError where one of the fields `names` counts more ranks than the model is wide."""
    for name in names:
        largest = max(np.ravel(config[name]), default=0)
        if largest > model.config.embed:
            raise ValueError(
                f"config.{name} {largest}: ranks are counted out of the model's width, {model.config.embed}"
            )


def greet() -> None:
    """Says on which devices this process runs, and which it leaves alone."""
    for line in (banner(), unused_here()):
        if line:
            command.say(line)


@contextlib.contextmanager
def held(out: str, mine: folder.Identity, results: int) -> Iterator[tuple[pathlib.Path, Clock]]:
    """The folder of a run (see `folder.held`) and its clock, which goes on from the seconds of an interrupted part."""
    clock = Clock()
    with folder.held(out, mine, results) as own:
        greet()
        clock.resume(own)
        yield own, clock


def load(config: ConfigDict, clock: Clock) -> ChatModel:
    """The model that the config names, on the mesh that it names or that suits the devices."""
    with clock.watch("load_s")(f"loading {config.model}", 0):
        dtype = dtype_of(config)
        mesh = command.mesh_of(config.mesh, named(config), dtype)
        asked = config.chat_template, config.system, config.raw, template_args(config.template_args)
        return load_chat_model(named(config), dtype, mesh, *asked)


def named(config: ConfigDict) -> Named:
    """The model that the config names, with its adapter."""
    return Adapted(config.model, config.adapter) if config.adapter else config.model


def dtype_of(config: ConfigDict) -> str | None:
    """The dtype that the config asks for; None for the checkpoint's own."""
    if config.dtype != "auto":
        return config.dtype
    return None if multiplies_bfloat16() else "float32"


def settings(config: ConfigDict) -> tuple[Setting, ...]:
    """The settings that the config names; see `setting_of`."""
    return tuple(setting_of(config, name) for name in config.settings)


def setting_of(config: ConfigDict, name: str) -> Setting:
    """One setting by its name. Raises ValueError for an unknown one, and for suffixes without a file of them."""
    return setting(name, load_suffixes(config.suffixes) if config.suffixes else ())


def exam(
    config: ConfigDict,
    model: ChatModel,
    prompts: Sequence[PromptSet],
    asked: Sequence[Setting],
    read: Reading | None = None,
) -> Exam:
    """What every variant is put to: `prompts` under the settings `asked`, and texts as the config has them.

    `read` is the reading "auto"; None reads passages of a file whole, and the built-in ones by halves.
    """
    texts = texts_of(config, model, read or ("whole" if config.text else "halves"))
    limit = config.get("zero_shot_limit", None)
    sampling = Sampling(repetition_penalty=config.repetition_penalty)
    return Exam(
        tuple(prompts),
        tuple(asked),
        judge(config.judge),
        Decoding(config.max_new_tokens, sampling, config.seed),
        *texts,
        batch_size=config.batch_size,
        tasks=tuple(config.get("zero_shot", ())),
        task_limit=Shuffled(limit) if config.get("zero_shot_order", "first") == LM_EVAL_03 else limit,
    )


def texts_of(config: ConfigDict, model: ChatModel, auto: Reading) -> Windows:
    """The rows that perplexity is of. Raises ValueError for a text that fills no window."""
    if config.reading in PROTOCOLS:
        if not config.passages:
            return Windows(())
        text = load_text(config.text) if config.text else "\n\n".join(builtin_prose())
        return windows(model, text, config.reading, config.passages, config.window or None)
    texts = load_passages(config.text, config.passages) if config.text else builtin_prose()[: config.passages]
    return Windows(tuple(text_rows(model, texts, auto if config.reading == "auto" else config.reading)))


def evaluated(roles: Roles) -> tuple[PromptSet, ...]:
    """The prompts to evaluate; unlabelled ones are harmful, those of the role "harmless" safe."""
    harmful = (prompts.labelled(True) for prompts in roles["evaluation"])
    return (*harmful, *(prompts.labelled(False) for prompts in roles["harmless"]))


def scored_rows(
    config: ConfigDict, model: ChatModel, side: str, sets: Sequence[PromptSet], store: Store, clock: Clock
) -> list[Row]:
    """The rows of one side ("safety" or "utility"), from a file or answered by the model and kept in `store`.

    The safety side has prompts that the model refuses, the other side those that it answers. Asked without its system
    prompt unless config.score_system. Raises ValueError for a side without prompts, and as `own_answers_once` and
    `pairs_from_file` do.
    """
    if not config.score_system:
        model = model.with_prompt(system=None)
    if file := config[f"{side}_pairs"]:
        return draw(pairs_from_file(model, file, config.raw_pairs), config.samples, config.seed)
    prompts = [prompt for each in sets for prompt in each.prompts]
    if not prompts:
        raise ValueError(f"config.{side} is empty; name prompt sets, or a file of prompts with responses")
    kept = own_answers_of(config, side)
    with clock.watch("own_answers_s")(f"own answers, {side}", len(prompts)) as done:
        rows = own_answers_once(store, model, prompts, kept, done)
    return draw(rows, config.samples, config.seed)


def own_answers_of(config: ConfigDict, side: str) -> OwnAnswers:
    """Which own answers make up a side: refusals for safety, answers for utility."""
    return OwnAnswers(judge(config.scoring_judge), side == "safety", config.answer_tokens, config.batch_size)


def scored_records(config: ConfigDict, model: ChatModel, roles: Roles, store: Store) -> tuple[Scored, ...]:
    """What became of the prompts of each side whose own answers the run made, in the order of the sides."""
    found = []
    for side in SIDES:
        if side not in roles or side not in config or config[f"{side}_pairs"]:
            continue
        prompts = [prompt for each in roles[side] for prompt in each.prompts]
        kept = kept_count(store, model, prompts, own_answers_of(config, side)) if prompts else None
        if kept is not None:
            found.append(Scored(side, len(prompts), kept, min(kept, config.samples), config.scoring_judge))
    return tuple(found)


def scored_roles(config: ConfigDict, further: Sequence[str] = ()) -> Roles:
    """Prompt sets by role: scored for safety and for utility, of `further` fields, evaluated, and harmless.

    No prompt is both scored and evaluated, those of files of pairs included, which have no roles. Raises ValueError
    where there is nothing to evaluate.
    """
    if not config.evaluation:
        raise ValueError("config.evaluation is empty; name at least one set of harmful prompts")
    scored = {side: () if config[f"{side}_pairs"] else config[side] for side in SIDES}
    scored |= {name: config[name] for name in further}
    evaluate = {name: config[name] for name in ("evaluation", "harmless")}
    roles = assign_roles(scored, evaluate, config.data or None, (), config.seed)
    for file in (config[f"{side}_pairs"] for side in SIDES if config[f"{side}_pairs"]):
        evaluated = [prompts for name in evaluate for prompts in roles[name]]
        check_unseen(file, prompts_of_pairs(file), evaluated, config.raw_pairs)
    return roles


def score_settings(config: ConfigDict) -> ScoreSettings:
    """How weights are scored and compared. Raises ValueError as `ScoreSettings` does."""
    return ScoreSettings(
        config.score,
        config.positions,
        config.loss,
        config.per,
        config.score_batch_size,
        config.get("use_diff", False),
        config.seed,
        config.batch_size,
        config.get("layers_at_a_time", None),
    )


def beside(name: str, model: ChatModel) -> ChatModel | None:
    """The model `name`, laid out as `model`; None where the name is empty."""
    return load_chat_model(name, model.config.dtype, model.mesh, raw=True) if name else None


def material(config: ConfigDict, model: ChatModel, roles: Roles, store: Store, clock: Clock) -> Material:
    """Scores, bases and the ranking of heads, each made when it is needed and kept in `store`."""
    return Material(
        model,
        lambda side: scored_rows(config, model, side, roles[side], store, clock),
        store,
        score_settings(config),
        {side: [prompt for prompts in roles[side] for prompt in prompts.prompts] for side in SIDES},
        beside(config.base_model, model),
        clock.watch("scores_s"),
    )


def finish(study: Study, task: str, config: ConfigDict, roles: Roles, clock: Clock, details: object = None) -> Run:
    """Writes the record, the samples and the report of a study; every role with its sets goes into the record."""
    for tokens in study.tokens:
        clock.count("exam_s", tokens)
    run = record(study, task, config.to_dict(), data_records(roles), details)
    scored = scored_records(config, study.model, roles, study.store)
    run = dataclasses.replace(run, scored=scored, published=published(config))
    files = {"samples": "samples.jsonl", "report": "report.html"}
    run = timed(run, clock.record(study.model.config, config.batch_size), files)
    write_run(study.out, run, study)
    return run


def published(config: ConfigDict) -> tuple[PublishedTable, ...]:
    """The tables that the config holds the run against."""
    return tuple(TABLES[source] for source in config.get("expected", ()))


def show(run: Run, out: pathlib.Path) -> None:
    """Prints the table of a run to standard output, and to standard error where its files are."""
    Console(highlight=False, quiet=command.console.quiet).print(result_table(run))
    for line in (*scored_lines(run), use_line(run.timings)):
        command.console.print(line, soft_wrap=True)
    for name in ("report.html", "run.json", "samples.jsonl", "vectors.safetensors"):
        if (out / name).exists():
            command.console.print(f"  {out / name}", soft_wrap=True)
