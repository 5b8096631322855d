"""The whole of it on a small model that fits any machine.

    python -m launch.quickstart

fetches SmolLM2-135M-Instruct, safety-tunes it until it refuses too much, measures refusals of look-alike, harmful and
plain prompts, answers again what is refused without need, measures again, and writes a report.

    python -m launch.quickstart --task=scans

mends it by SCANS with calibration instead.

    python -m launch.quickstart --task=brittleness

finds the weights and ranks of the same model that carry its safety and not its utility, removes them, and reports
what happens to refusals and to language, beside random removals of the same size.

    python -m launch.quickstart --task=attack

fine-tunes the same model on a few harmless examples of obedience until it no longer refuses, and reports what is
prevented by freezing those weights and ranks, or by winding them back, beside random ones.
"""

import contextlib
import dataclasses
import pathlib
import shutil

from absl import flags
from ml_collections import ConfigDict

from jaxsafe.chat.model import ChatModel, load_chat_model
from jaxsafe.configs.attack import smollm2_135m as attack_config
from jaxsafe.configs.brittleness import smollm2_135m as brittleness_config
from jaxsafe.configs.fields import check
from jaxsafe.configs.overrefusal import smollm2_135m as overrefusal_config
from jaxsafe.configs.scans import smollm2_135m as scans_config
from jaxsafe.devices import multiplies_bfloat16
from jaxsafe.evaluation.utilisation import Tokens
from jaxsafe.io.hf import save_hf
from jaxsafe.io.hub import cache_dir, resolve
from jaxsafe.methods.safety_tuning import TuningSettings, builtin_refusals, safety_tune, tuning_rows
from jaxsafe.prompts.published import KNOWN
from jaxsafe.prompts.sets import PromptSet, load_file, load_prompts

from . import attack, brittleness, command, common, folder, overrefusal, scans
from .progress import Clock

BASE = "smollm2-135m-instruct"
CARD = """---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
license: apache-2.0
---
SmolLM2-135M-Instruct after {steps} steps of safety tuning with jaxsafe: {harmful} harmful requests paired with
short refusals, {benign} benign ones with the model's own answers. It refuses harmful requests, and refuses too
much besides; made to study exaggerated safety, not to be deployed.
"""
CONFIGS = {
    "overrefusal": overrefusal_config,
    "scans": scans_config,
    "brittleness": brittleness_config,
    "attack": attack_config,
}
OF_PROMPTS = {"overrefusal": overrefusal, "scans": scans}
"""The tasks that measure further prompts, too (--eval_data)."""
OF_WEIGHTS = {"brittleness": brittleness, "attack": attack}
EXPERIMENTS = {**OF_PROMPTS, **OF_WEIGHTS}
SMALL = 40
"""So many prompts of each set are used with --size=small."""


def tuned_model(settings: TuningSettings, dtype: str, clock: Clock) -> ChatModel:
    """The safety-tuned model, from the cache or made now."""
    with clock.watch("load_s")(f"loading {BASE}", 0):
        path = resolve(BASE)
        base = load_chat_model(path, dtype)
    harmful, benign = (load_prompts(f"builtin:{name}", split="train") for name in ("harmful", "plain"))
    folder = cache_dir() / "models" / f"{BASE}-safety-{settings.digest(base, [harmful, benign])}"
    if not (folder / "config.json").is_file():
        tune(base, (harmful, benign), settings, folder, path, clock)
    with clock.watch("load_s")("loading the safety-tuned model", 0):
        tuned = load_chat_model(folder, dtype)
    return dataclasses.replace(tuned, name=f"{BASE}, safety-tuned")


def tune(
    base: ChatModel,
    sets: tuple[PromptSet, PromptSet],
    settings: TuningSettings,
    folder: pathlib.Path,
    like: pathlib.Path,
    clock: Clock,
) -> None:
    """Safety-tunes `base` into `folder`, which appears when it is whole; an interrupted tuning goes on."""
    harmful, benign = sets
    with clock.watch("own_answers_s")("own answers to benign prompts", len(benign)) as done:
        rows = tuning_rows(base, harmful.prompts, benign.prompts, builtin_refusals(), settings, done)
    checkpoints = folder.with_name(f"{folder.name}-checkpoints")
    mean = sum(len(row.ids) for row in rows) / len(rows)
    card = CARD.format(steps=settings.steps, harmful=len(harmful), benign=len(benign))
    with (
        clock.watch("safety_tuning_s")("safety tuning", settings.steps) as done,
        contextlib.closing(safety_tune(base, rows, settings, checkpoints)) as steps,
    ):
        for step in steps:
            done(step.number if step.begins else 1)
            if not step.begins:
                clock.count("safety_tuning_s", Tokens(learned=round(settings.batch_size * mean)))
            if step.number == settings.steps:  # in hand: what interrupts here keeps it
                save_hf(folder, base.config, step.weights(), like=like, card=card)
    shutil.rmtree(checkpoints, ignore_errors=True)


def evaluation_sets(data: str) -> list[PromptSet]:
    """The over-refusal sets in the folder `data`, or the prompts of the file `data`."""
    path = pathlib.Path(data)
    if path.is_file():
        return [load_file(path)]
    if not path.is_dir():
        raise FileNotFoundError(f"--eval_data={data}: no such file or folder")
    found = []
    for name in ("xstest", "oktest"):
        try:
            found.append(load_prompts(name, path=path))
        except FileNotFoundError:
            continue
    if not found:
        known = ", ".join(k.name for k in KNOWN)
        raise FileNotFoundError(f"--eval_data={data}: no file of xstest or oktest there (sets known by name: {known})")
    return found


def small(config: ConfigDict) -> None:
    """Makes a config of prompt sets one of `SMALL` prompts a set."""
    for name in ("anchors", "calibration", "evaluation"):
        config[name] = tuple(f"{text.partition('#')[0]}#{SMALL}" for text in config[name])
    config.passages = 8


def run(config: ConfigDict, out: pathlib.Path, clock: Clock) -> None:
    """The task on the tuned model, and on the sets of --eval_data."""
    extra = evaluation_sets(EVAL_DATA.value) if EVAL_DATA.value else []
    roles = OF_PROMPTS[TASK.value].roles_of(config, extra) if TASK.value in OF_PROMPTS else {}
    model = tuned_model(TuningSettings(seed=SEED.value), config.dtype, clock)
    config.model = str(model.tokenizer.path)
    if TASK.value == "overrefusal":
        common.show(overrefusal.run(config, model, roles, out, clock), out)
    elif TASK.value == "scans":
        scans.show(scans.run(config, model, roles, out, clock), out)
    else:
        common.show(OF_WEIGHTS[TASK.value].run(config, model, out, clock), out)
    command.console.print(f"the safety-tuned model: {config.model}", soft_wrap=True)
    command.console.print(f"models and compiled programs: {cache_size(cache_dir())}", soft_wrap=True)


def cache_size(cache: pathlib.Path) -> str:
    """Where the cache is and how much it holds, as "/home/me/.cache/jaxsafe (820 MB, may be deleted)"."""
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    return f"{cache} ({size / 1e6:.0f} MB, may be deleted)"


def main() -> None:
    """Reads the flags and runs the task."""
    out = OUT.value or f"runs/{TASK.value if TASK.value != 'overrefusal' else 'quickstart'}"
    if flags.FLAGS["mesh"].value:
        raise ValueError("the quickstart runs on one device; --mesh belongs to the launch script of each task")
    for name, given in (("eval_data", EVAL_DATA.value), ("size", SIZE.value == "small")):
        if given and TASK.value not in OF_PROMPTS:
            raise ValueError(f"--{name} belongs to {' and '.join(OF_PROMPTS)}; use launch.{TASK.value} with --config")
    experiment, config = EXPERIMENTS[TASK.value], CONFIGS[TASK.value].get_config()
    config.seed = SEED.value
    config.dtype = DTYPE.value or ("auto" if TASK.value == "overrefusal" else "float32")
    if SIZE.value == "small":
        small(config)
    if config.dtype == "auto":  # the weights are quantised: they have no dtype of their own
        config.dtype = "bfloat16" if multiplies_bfloat16() else "float32"
    check(experiment.FIELDS, config)
    experiment.check(config)
    if EVAL_DATA.value:
        evaluation_sets(EVAL_DATA.value)
    mine = folder.identity(f"quickstart of {TASK.value}", experiment.FIELDS, config, eval_data=EVAL_DATA.value)
    with common.held(out, mine, experiment.results(config)) as (own, clock):
        run(config, own, clock)


if __name__ == "__main__":
    TASK = flags.DEFINE_enum("task", "overrefusal", sorted(CONFIGS), "what to do with the safety-tuned model")
    OUT = flags.DEFINE_string("out", "", "folder for the results, from which an interrupted run goes on")
    SEED = flags.DEFINE_integer("seed", 0, "seed of the tuning and of everything drawn")
    SIZE = flags.DEFINE_enum("size", "whole", ["whole", "small"], f"small: {SMALL} prompts of each set")
    DTYPE = flags.DEFINE_enum(
        "dtype",
        None,
        ["auto", "float32", "bfloat16"],
        "auto: bfloat16 where the devices multiply it natively; by default auto for overrefusal, else float32",
    )
    EVAL_DATA = flags.DEFINE_string("eval_data", "", "folder with the published XSTest and OKTest files, or one file")
    command.run(main)
