"""Remedies for over-refusal side by side on any supported chat model: one table, each with a control of its size.

python -m launch.overrefusal --config=configs/overrefusal/llama31_8b_instruct.py --out=runs/llama31 \
--config.data=DATA_FOLDER --config.remedies="('mend', 'scans')"
"""

import functools
import pathlib
from contextlib import AbstractContextManager

from absl import flags
from ml_collections import ConfigDict

from jaxsafe.chat.mending import Mending
from jaxsafe.chat.model import ChatModel
from jaxsafe.configs.overrefusal.base import FIELDS, SCANS
from jaxsafe.evaluation.judges.keyword import judge
from jaxsafe.evaluation.stats import rate
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.kernels.steering import Rule
from jaxsafe.methods import remedies
from jaxsafe.methods.baselines import BASELINES, baseline
from jaxsafe.methods.dro import DRO
from jaxsafe.methods.evidence import evidence_once
from jaxsafe.methods.mending_choice import Trial
from jaxsafe.methods.remedies import Bench, Made, RemedyFit
from jaxsafe.methods.scans_calibration import Calibration, OpenChoice
from jaxsafe.methods.scans_preparation import prepare_scans
from jaxsafe.model.layers import LayerRange
from jaxsafe.progress import Progress
from jaxsafe.prompts.roles import Roles, assign_roles, labelled
from jaxsafe.records.overrefusal import Ceiling, Cost, Details, Mended, Remedy
from jaxsafe.records.run import Run, Variant
from jaxsafe.records.scans import Choice
from jaxsafe.study.study import Study

from . import command, common, folder
from .progress import Clock
from .settings import Experiment

PLAIN = "as it is"
PREPARE = ("anchors", "calibration")
Rules = dict[str, tuple[Variant, Rule | Mending | None]]


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that contradict each other, FileNotFoundError for what is not there."""
    common.check(config)
    for name, sets in roles_of(config).items():
        if name in PREPARE and len(set(harmful := labelled(sets)[1])) < 2:
            raise ValueError(f"config.{name} needs harmful and safe prompts; all {len(harmful)} are of one kind")


def roles_of(config: ConfigDict, extra: tuple = ()) -> Roles:
    """The prompt sets of the config, each prompt in one role."""
    evaluate = {name: config[name] for name in ("evaluation", "harmless")}
    prepare = {name: config[name] for name in PREPARE}
    return assign_roles(prepare, evaluate, config.data or None, extra, config.seed)


def results(config: ConfigDict) -> int:
    """How many results the experiment has: the model as it is, each remedy, and each control."""
    steered = sum(name not in BASELINES for name in config.remedies)
    return 1 + len(config.remedies) + (steered if config.controls else 0)


def run(config: ConfigDict, model: ChatModel, roles: Roles, out: pathlib.Path, clock: Clock) -> Run:
    """The whole experiment; what it finds is in `out` and in the returned record."""
    harmless = tuple(prompts.labelled(False) for prompts in roles["harmless"])
    exam = common.exam(config, model, (*roles["evaluation"], *harmless), common.settings(config), read="halves")
    study = Study(out, model, exam, clock.watch("exam_s"))
    study.check()
    bench = bench_of(config, roles, study, clock)

    made: list[Made] = []
    mended: Mended | None = None
    for name in config.remedies:
        if name == "mend":
            found, mended = remedies.mend(bench)
            made.append(found)
        elif name not in BASELINES:
            made.append(steered_by_scans(config, bench, roles) if name == SCANS else remedies.REMEDIES[name](bench))

    rules = rules_of(config, made)
    variants, steerings = zip(*rules.values(), strict=True)
    study.examine_together(list(variants), lambda: model.steered(steerings))
    others = [name for name in config.remedies if name in BASELINES]
    for name in others:
        settings = DRO(samples=config.dro_samples, steps=config.dro_steps, answer_tokens=config.calibration_tokens)
        follows = [name, BASELINES[name], bench.evidence.sha256, repr(settings) if name == "dro" else None]
        study.examine(Variant(name, follows, PLAIN), functools.partial(baseline, name, bench, settings))
    costs = tuple(Cost(name, passes(study, name)) for name in study.examined)
    gates = (bench.gate.report,) if any(each.remedy.gate == bench.gate.report.name for each in made) else ()
    text = config.text or "built-in prose"
    by_name = {each.remedy.name: each.remedy for each in made}
    by_name |= {name: Remedy(name, *BASELINES[name]) for name in others}
    gated = [m.remedy.name for m in made if m.remedy.gate == bench.gate.report.name]
    limits = ceilings(study, gated[0]) if gated else ()
    details = Details(gates, tuple(by_name[name] for name in config.remedies), costs, text, mended, limits)
    return common.finish(study, "overrefusal", config, roles, clock, details)


def bench_of(config: ConfigDict, roles: Roles, study: Study, clock: Clock) -> Bench:
    """What remedies are fitted with, from anchors and calibration prompts."""
    told, decoding = judge(config.judge), Decoding(config.calibration_tokens, seed=config.seed)
    layers = None if config.layers is None else LayerRange.parse(config.layers, "config.layers")
    if layers is not None:
        layers.within(study.model.config.layers)
    if lacking := [n for n in config.gate_layers or () if n >= study.model.config.layers]:
        raise ValueError(f"config.gate_layers {lacking[0]}: the model has blocks 0 to {study.model.config.layers - 1}")
    sets = (*roles["anchors"], *roles["calibration"])
    with clock.watch("evidence_s")("calibration prompts", sum(map(len, sets))) as done:
        asked = decoding, config.batch_size
        evidence = evidence_once(study.store, study.model, sets, told, asked, done)
    fit = RemedyFit(
        config.gate_layers,
        layers,
        config.missed,
        config.kl,
        config.span,
        tuple(config.strengths),
        config.candidate_prompts,
        config.candidate_positions,
        config.published,
        config.seed,
    )
    trial = Trial(told, decoding, batch_size=config.batch_size)
    return Bench(study.model, evidence, study.store, trial, fit, clock.watch("fit_s"))


def steered_by_scans(config: ConfigDict, bench: Bench, roles: Roles) -> Made:
    """SCANS as published, or calibrated; its control has random directions."""

    def watch(what: str, total: int) -> AbstractContextManager[Progress]:
        return bench.watch(f"SCANS, {what}", total)

    choice: Choice | OpenChoice = OpenChoice(strengths=(0.01, 0.02, 0.03))
    if config.scans_choice is not None:
        scored, layers, threshold, alpha = config.scans_choice
        choice = Choice(LayerRange(*scored), LayerRange(*layers), threshold, alpha)
    calibration = Calibration.of(
        roles["calibration"],
        judge=bench.trial.judge,
        decoding=bench.trial.decoding,
        batch_size=config.batch_size,
    )
    prepared = prepare_scans(bench.model, roles["anchors"], calibration, choice, bench.store, watch, config.batch_size)
    control = remedies.random_scans(prepared.steering, bench.random)
    strength = prepared.choice.alpha_rel or prepared.choice.alpha
    remedy = Remedy(SCANS, "arXiv 2408.11491", str(prepared.choice), "transition score of SCANS", strength)
    return Made(prepared.steering, control, remedy)


def rules_of(config: ConfigDict, made: list[Made]) -> Rules:
    """{name: (variant, rule)} of the model as it is, of every remedy, and of every control behind it."""
    rules: Rules = {PLAIN: (Variant(PLAIN), None)}
    for rule, control, remedy in made:
        random = None if control is None or not config.controls else f"{remedy.name}, random direction"
        about = {"is": remedy.about}
        rules[remedy.name] = Variant(remedy.name, remedies.identity(rule), PLAIN, random, about=about), rule
        if random is not None and control is not None:
            rules[random] = Variant(random, remedies.identity(control), PLAIN, about={"control": True}), control
    return rules


def ceilings(study: Study, gated: str) -> tuple[Ceiling, ...]:
    """What the gate of the variant `gated` leaves to any edit, by set and label."""
    pairs = list(zip(study.examined[PLAIN].samples, study.examined[gated].samples, strict=True))
    kinds = dict.fromkeys((plain.set, plain.harmful) for plain, _ in pairs if plain.harmful is not None)
    found = []
    for name, harmful in kinds:
        mine = [(p.refused, not s.steered_as_harmful) for p, s in pairs if (p.set, p.harmful) == (name, harmful)]
        left = [None if refused is None else refused and not opened for refused, opened in mine]
        shares = rate([opened for _, opened in mine]), rate([refused for refused, _ in mine]), rate(left)
        found.append(Ceiling(name, bool(harmful), *shares))
    return tuple(found)


def passes(study: Study, name: str) -> float:
    """How often a prompt was answered under a variant, on average."""
    samples = study.examined[name].samples
    return sum(sample.passes for sample in samples) / max(1, len(samples))


def main() -> None:
    """Reads the flags and runs the experiment."""
    config = command.config()
    with common.held(OUT.value, folder.identity("overrefusal", FIELDS, config), results(config)) as (out, clock):
        roles, model = roles_of(config), common.load(config, clock)
        common.show(run(config, model, roles, out, clock), out)


if __name__ == "__main__":
    OUT = flags.DEFINE_string("out", "runs/overrefusal", "folder for the results, from which a run goes on")
    command.run(main, Experiment("configs/overrefusal/smollm2_135m.py", FIELDS, check))
