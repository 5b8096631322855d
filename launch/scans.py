"""SCANS on any supported chat model: directions, calibration, refusals without and with steering, vectors, report.

python -m launch.scans --config=configs/scans/llama2_7b_chat.py --out=runs/llama2 --config.data=DATA_FOLDER
"""

import pathlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

from absl import flags
from ml_collections import ConfigDict

from jaxsafe.chat.model import ChatModel
from jaxsafe.configs.scans.base import FIELDS
from jaxsafe.evaluation.judges.keyword import judge
from jaxsafe.io.vectors import (
    is_control_vector,
    load_steering,
    load_vectors,
    save_control_vector,
    save_steering,
)
from jaxsafe.kernels.sampling import Decoding
from jaxsafe.methods import scans
from jaxsafe.methods.scans import Prepared
from jaxsafe.methods.scans_calibration import Calibration, OpenChoice
from jaxsafe.methods.scans_preparation import prepare_scans
from jaxsafe.model.layers import LayerRange
from jaxsafe.progress import Progress
from jaxsafe.prompts.roles import Roles, assign_roles, labelled
from jaxsafe.prompts.sets import PromptSet
from jaxsafe.reading import reading
from jaxsafe.records.run import Run, Variant, from_json, plain
from jaxsafe.records.scans import Choice, Details, Preparation
from jaxsafe.study.study import Study

from . import command, common, folder
from .progress import Clock
from .settings import Experiment

PLAIN, STEERED = "as it is", "SCANS"
STAGES = {
    "refusal directions": "directions_s",
    "classifier on calibration prompts": "classifier_s",
    "layers and strength": "strength_s",
}
"""What the record calls the time of each stage of a preparation."""


OPEN = ("scored", "threshold", "layers", "alpha", "alpha_rel")
"""What calibration chooses where the config leaves it open."""


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that contradict each other, FileNotFoundError for what is not there."""
    common.check(config)
    given = [name for name in OPEN if config[name] is not None]
    if config.vectors and given:
        raise ValueError(f"config.vectors brings its own {', '.join(given)}; leave config.{given[0]} out")
    if config.vectors:
        check_vectors(config.vectors)
    roles = roles_of(config)
    for name in ("anchors", "calibration"):
        if roles[name] or not (config.vectors or (name == "calibration" and choice_of(config) is not None)):
            check_kinds(name, roles[name])


def check_kinds(name: str, sets: Sequence[PromptSet]) -> None:
    """Raises ValueError unless some prompts of the role `name` are harmful and some are not."""
    harmful = labelled(sets)[1] if sets else []
    if len(set(harmful)) < 2:
        raise ValueError(
            f"config.{name} needs harmful and safe prompts; got {sum(harmful)} and {len(harmful) - sum(harmful)}"
        )


def choice_of(config: ConfigDict) -> Choice | None:
    """The choice that the config makes by itself; see `scans.fixed_choice`."""
    given = ("alpha", "alpha_rel", "scored", "layers", "threshold", "share_of")
    return scans.fixed_choice(*(config[name] for name in given))


def roles_of(config: ConfigDict, extra: Sequence[PromptSet] = ()) -> Roles:
    """The prompt sets of the config, each prompt in one role; those that nothing is made from are left out."""
    prepare = {
        "anchors": () if config.vectors else config.anchors,
        "calibration": () if config.vectors or choice_of(config) is not None else config.calibration,
    }
    evaluate = {name: config[name] for name in ("evaluation", "harmless")}
    return assign_roles(prepare, evaluate, config.data or None, extra, config.seed)


def results(config: ConfigDict) -> int:
    """How many results the experiment has: the model as it is, and steered."""
    return 2


def run(config: ConfigDict, model: ChatModel, roles: Roles, out: pathlib.Path, clock: Clock) -> Run:
    """The whole experiment; what it finds is in `out` and in the returned record."""
    fixed = choice_of(config)
    for name in ("scored", "layers"):
        if config[name] is not None:
            LayerRange.parse(config[name], f"config.{name}").within(model.config.layers)
    harmless = tuple(prompts.labelled(False) for prompts in roles["harmless"])
    exam = common.exam(config, model, (*roles["evaluation"], *harmless), common.settings(config), read="halves")
    study = Study(out, model, exam, clock.watch("exam_s"))
    study.check()
    scans.check_lengths(model, roles["anchors"], exam.texts)
    scans.check_lengths(model, roles["calibration"], exam.texts, config.calibration_tokens)

    prepared = loaded(config.vectors, model) if config.vectors else prepare(config, model, fixed, roles, study, clock)
    save_vectors(out, model, prepared)

    plain_variant = Variant(PLAIN)
    steered = Variant(STEERED, scans.identity(prepared.steering), PLAIN, about=plain(prepared.choice))
    rules = [None, prepared.steering]
    study.examine_together([plain_variant, steered], lambda: model.steered(rules))
    samples = [study.examined[name].samples for name in (PLAIN, STEERED)]
    details = scans.details(prepared, samples[0], samples[1], exam.settings[0].name, config.text or "built-in prose")
    return common.finish(study, "scans", config, roles, clock, details)


def prepare(
    config: ConfigDict, model: ChatModel, fixed: Choice | None, roles: Roles, study: Study, clock: Clock
) -> Prepared:
    """The steering of a given choice, or of what the config leaves open, chosen on the calibration prompts."""

    def watch(what: str, total: int) -> AbstractContextManager[Progress]:
        return clock.watch(STAGES[what])(what, total)

    calibration = None if fixed else calibration_of(config, roles)
    choice = fixed or open_choice(config)
    return prepare_scans(model, roles["anchors"], calibration, choice, study.store, watch, config.batch_size)


def calibration_of(config: ConfigDict, roles: Roles) -> Calibration:
    """The calibration prompts, and how settings are tried on them."""
    return Calibration.of(
        roles["calibration"],
        judge=judge(config.judge),
        decoding=Decoding(config.calibration_tokens, seed=config.seed),
        batch_size=config.batch_size,
        kl_limit=config.kl_limit,
        max_drop=config.max_drop,
        share_of=config.share_of,
    )


def open_choice(config: ConfigDict) -> OpenChoice:
    """What the config says of the choice; the rest is left open."""
    return OpenChoice(
        None if config.scored is None else LayerRange.parse(config.scored, "config.scored"),
        None if config.layers is None else LayerRange.parse(config.layers, "config.layers"),
        config.threshold,
        tuple(config.alpha_grid) if config.alpha_rel is None else (config.alpha_rel,),
        config.threshold_by,
    )


def check_vectors(path: str) -> None:
    """Raises FileNotFoundError and ValueError for vectors that no model could be steered with."""
    if pathlib.Path(path).is_file() and is_control_vector(path):
        return  # what it has to fit is not known before the model
    load_steering(path, affirmative=())


def loaded(path: str, model: ChatModel) -> Prepared:
    """A steering saved for the same model, in whatever dtype: by an earlier run, by hand, or as a control vector."""
    steering, metadata = load_vectors(path, model.config, model.origin(), scans.affirmative_ids(model).tolist())
    record, choice = metadata.get("preparation"), metadata.get("choice")
    with reading(path, "holds metadata that cannot be read"):
        chosen = scans.choice_of(steering) if choice is None else from_json(choice, Choice)
        return Prepared(steering, chosen, None if record is None else from_json(record, Preparation))


def save_vectors(out: pathlib.Path, model: ChatModel, prepared: Prepared) -> None:
    """The steering as safetensors, with how it came about, and as a GGUF control vector toward refusal."""
    out.mkdir(parents=True, exist_ok=True)
    metadata = {
        "model": model.name,
        "origin": model.origin(),
        "chat_template_sha256": model.template_sha256,
        "affirmative": scans.AFFIRMATIVE,
        "choice": plain(prepared.choice),
        "preparation": plain(prepared.record),
    }
    save_steering(out / "vectors.safetensors", prepared.steering, metadata)
    if prepared.choice.layers.first > 0:  # a control vector cannot name block 0
        save_control_vector(out / "refusal.control.gguf", prepared.steering, model.config.family)


def show(run: Run, out: pathlib.Path) -> None:
    """Prints the result as a table, and what was steered."""
    common.show(run, out)
    command.console.print(str(from_json(run.details, Details).choice), soft_wrap=True)


def main() -> None:
    """Reads the flags and runs the experiment."""
    config = command.config()
    with common.held(OUT.value, folder.identity("scans", FIELDS, config), results(config)) as (out, clock):
        roles, model = roles_of(config), common.load(config, clock)
        show(run(config, model, roles, out, clock), out)


if __name__ == "__main__":
    OUT = flags.DEFINE_string("out", "runs/scans", "folder for the results; an interrupted run goes on from there")
    command.run(main, Experiment("configs/scans/smollm2_135m.py", FIELDS, check))
