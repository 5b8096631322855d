"""Attacks on a chat model that leave its weights alone, each beside a control where one makes sense.

python -m launch.jailbreak --config=configs/jailbreak/llama2_7b_chat.py --out=runs/llama2_jailbreak \
--config.data=DATA_FOLDER --config.attacks="('prefill', 'decoding')"
"""

import functools
import pathlib

from absl import flags
from ml_collections import ConfigDict

from jaxsafe.chat.model import ChatModel
from jaxsafe.configs.jailbreak.base import FIELDS
from jaxsafe.evaluation.judges.keyword import judge
from jaxsafe.evaluation.settings import load_suffixes
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.methods import jailbreaks
from jaxsafe.methods.evidence import evidence_once
from jaxsafe.methods.jailbreak_findings import begun, tries_of
from jaxsafe.methods.jailbreaks import Attempt
from jaxsafe.methods.mending_choice import Trial
from jaxsafe.methods.refusal_direction import Direction
from jaxsafe.methods.remedies import Bench, RemedyFit
from jaxsafe.model.layers import LayerRange
from jaxsafe.prompts.roles import Roles, assign_roles, labelled
from jaxsafe.records.jailbreak import Details
from jaxsafe.records.run import Run
from jaxsafe.study.study import Study

from . import command, common, folder
from .progress import Clock
from .settings import Experiment

SWEEP = ("temperatures", "top_ps", "top_ks")


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that contradict each other, FileNotFoundError for what is not there."""
    common.check(config)
    if bool(config.suffixes) != ("suffix" in config.attacks):
        raise ValueError(f"config.suffixes {config.suffixes!r} with config.attacks {config.attacks}: give both or none")
    for name in {"no_template", "persona"} & set(config.attacks) if config.raw else ():
        raise ValueError(f"config.raw asks prompts without a template, so that attack {name!r} would do nothing")
    for name in ("attacks", "openings", *SWEEP, "scales"):
        if len(set(config[name])) < len(config[name]):
            raise ValueError(f"config.{name} {config[name]} has an entry twice; give each once")
    if "decoding" in config.attacks and not any(config[name] for name in SWEEP):
        raise ValueError(f"attack 'decoding' needs an entry of config.{', config.'.join(SWEEP)}; all are empty")
    if 1 in config.scales:
        raise ValueError(f"config.scales {config.scales}: a factor of 1 scales nothing; leave it out")
    roles = roles_of(config)
    if "ablation" in config.attacks and len(set(labelled(roles["calibration"])[1])) < 2:
        raise ValueError("config.calibration needs harmful and safe prompts; all are of one kind")
    if all(label is False for prompts in roles["evaluation"] for label in prompts.harmful):
        raise ValueError(f"config.evaluation {config.evaluation} has no harmful prompt; name a set that has")
    results(config)


def roles_of(config: ConfigDict) -> Roles:
    """The prompt sets of the config, each prompt in one role."""
    evaluate = {name: config[name] for name in ("evaluation", "harmless")}
    return assign_roles({"calibration": config.calibration}, evaluate, config.data or None, (), config.seed)


def results(config: ConfigDict) -> int:
    """How many results the experiment has."""
    counts = {
        "prefill": 2 * len(config.openings),
        "no_template": 1,
        "persona": 2,
        "decoding": 2 * sum(len(config[name]) for name in SWEEP),
        "ablation": 1 + config.controls,
        "scaling": len(config.scales) * (1 + config.controls),
        "suffix": 2 * len(load_suffixes(config.suffixes)) if config.suffixes else 0,
    }
    return 1 + sum(counts[name] for name in config.attacks)


def run(config: ConfigDict, model: ChatModel, roles: Roles, out: pathlib.Path, clock: Clock) -> Run:
    """The whole experiment; what it finds is in `out` and in the returned record."""
    exam = common.exam(config, model, common.evaluated(roles), (jailbreaks.ASKED,), read="halves")
    study = Study(out, model, exam, clock.watch("exam_s"))
    study.check()
    direction = direction_of(config, roles, study, clock) if "ablation" in config.attacks else None
    attempts = [
        jailbreaks.asked(),
        *(a for name in config.attacks for a in attempts_of(name, config, model, direction)),
    ]
    studies = [study.under(attempt.exam(exam)) for attempt in attempts]
    for each in studies:
        each.check()  # before the first of them is examined
    for each, attempt in zip(studies, attempts, strict=True):
        each.examine(attempt.variant, functools.partial(attempt.made, model))
    samples = {name: examined.samples for name, examined in study.examined.items()}
    details = Details(
        {name: jailbreaks.SOURCES[name] for name in config.attacks},
        tries_of(attempts, samples),
        begun(attempts, samples, exam.judge),
        str(direction or ""),
        config.text or "built-in prose",
    )
    return common.finish(study, "jailbreak", config, roles, clock, details)


def attempts_of(name: str, config: ConfigDict, model: ChatModel, direction: Direction | None) -> list[Attempt]:
    """The attempts of one attack, with its controls; `direction` is that of refusal, where it is ablated."""
    tokenizer, L = model.tokenizer, model.config.layers
    layers = LayerRange.parse(config.scaled_layers or (max(1, L // 3), max(2, 2 * L // 3)), "config.scaled_layers")
    match name:
        case "prefill":
            return jailbreaks.prefills(tokenizer, config.openings)
        case "no_template":
            return jailbreaks.bare()
        case "persona":
            return jailbreaks.personas(config.persona)
        case "decoding":
            return jailbreaks.decodings(*(config[each] for each in SWEEP))
        case "ablation" if direction is not None:
            return jailbreaks.ablations(direction.vector, config.controls, config.seed)
        case "scaling":
            return jailbreaks.scalings(L, layers, config.scales, config.controls, config.seed)
        case "suffix":
            return jailbreaks.suffixed(tokenizer, load_suffixes(config.suffixes))
    raise ValueError(f"attack {name!r} is not known; use one of {', '.join(jailbreaks.SOURCES)}")


def direction_of(config: ConfigDict, roles: Roles, study: Study, clock: Clock) -> Direction:
    """The direction of refusal, found on the calibration prompts."""
    told, decoding = judge(config.judge), Decoding(config.calibration_tokens, seed=config.seed)
    with clock.watch("evidence_s")("calibration prompts", sum(map(len, roles["calibration"]))) as done:
        asked = decoding, config.batch_size
        evidence = evidence_once(study.store, study.model, roles["calibration"], told, asked, done)
    few, positions = config.candidate_prompts, config.candidate_positions
    fit = RemedyFit(candidate_prompts=few, candidate_positions=positions, seed=config.seed)
    trial = Trial(told, decoding, batch_size=config.batch_size)
    return Bench(study.model, evidence, study.store, trial, fit, clock.watch("fit_s")).refusal


def main() -> None:
    """Reads the flags and runs the experiment."""
    config = command.config()
    with common.held(OUT.value, folder.identity("jailbreak", FIELDS, config), results(config)) as (out, clock):
        roles, model = roles_of(config), common.load(config, clock)
        common.show(run(config, model, roles, out, clock), out)


if __name__ == "__main__":
    OUT = flags.DEFINE_string("out", "runs/jailbreak", "folder for the results, from which a run goes on")
    command.run(main, Experiment("configs/jailbreak/smollm2_135m.py", FIELDS, check))
