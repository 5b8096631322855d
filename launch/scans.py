"""SCANS on any supported chat model: directions, calibration, refusals before and after, vectors, report.

python -m launch.scans --config=configs/scans/llama2_7b_chat.py --out=runs/llama2 --config.data=DATA_FOLDER
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from rich.table import Table

from jaxsafe.evaluation.comparison import average, comparisons, judged, metrics
from jaxsafe.evaluation.judges import judge
from jaxsafe.evaluation.metrics import best_threshold, classification, roc
from jaxsafe.evaluation.perplexity import builtin_prose, halves, load_passages, perplexities
from jaxsafe.evaluation.record import data_record, environment, model_record, plain, write_run
from jaxsafe.evaluation.utilisation import Tokens
from jaxsafe.io.chat_model import ChatModel, load_chat_model
from jaxsafe.kernels.sampling import Sampling
from jaxsafe.kernels.steering import Steering
from jaxsafe.methods.scans import (
    AFFIRMATIVE,
    Decoding,
    Directions,
    affirmative_ids,
    find_directions,
    read_prompts,
    separation,
    steering_of,
    unsteered,
    vocabulary,
)
from jaxsafe.methods.scans_answers import answer_prompts
from jaxsafe.methods.scans_calibration import calibrate, choose_classifier, layer_candidates
from jaxsafe.methods.vectors import load_steering, save_control_vector, save_steering
from jaxsafe.parallel import banner
from jaxsafe.report.html import write_report
from jaxsafe.text.chat import check_context
from jaxsafe.text.datasets import PromptSet
from jaxsafe.text.roles import Roles, assign_roles, labelled
from launch import command
from launch.progress import Clock, progress_bar, use_line


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A steering and how it came about, in the terms of `run.json`."""

    steering: Steering
    threshold: float
    record: dict[str, Any]
    metadata: dict[str, Any]


def as_range(value: Sequence[int] | None, name: str) -> tuple[int, int] | None:
    """`value` as layers [first, end). Raises ValueError unless it is None or two numbers."""
    if value is None:
        return None
    if len(value) != 2:
        raise ValueError(f"config.{name} must be two layer numbers, first and end; got {tuple(value)}")
    return int(value[0]), int(value[1])


def prepare(config: ConfigDict, model: ChatModel, roles: Roles, clock: Clock) -> Prepared:
    """Directions from the anchors; threshold, layers and strength from the config or from calibration."""
    prompts, labels = labelled(roles.anchors)
    harmful, benign = ([p for p, h in zip(prompts, labels, strict=True) if h is side] for side in (True, False))
    if not harmful or not benign:
        raise ValueError(f"anchors need harmful and benign prompts; got {len(harmful)} and {len(benign)}")
    with clock.stage("directions_s"), progress_bar("refusal directions", len(labels)) as done:
        directions = find_directions(model, harmful, benign, config.batch_size, done)
        table = vocabulary(model, directions)
    record: dict[str, Any] = {
        "vocabulary": table,
        "directions": {"norm": directions.norm, "residual_norm": directions.residual_norm},
    }
    scored, layers = as_range(config.scored, "scored"), as_range(config.layers, "layers")
    if config.alpha is not None and layers and scored and config.threshold is not None:
        fixed = {"alpha": config.alpha, "alpha_rel": None, "threshold": config.threshold}
    else:
        scored, layers, fixed = calibrated(config, model, roles, directions, table, scored, layers, record, clock)
    choice = {"scored": list(scored), "layers": list(layers), **fixed}
    steering = steering_of(directions, scored, fixed["threshold"], layers, fixed["alpha"], fixed["alpha_rel"])
    return Prepared(steering, float(fixed["threshold"]), record, choice)


def calibrated(
    config: ConfigDict,
    model: ChatModel,
    roles: Roles,
    directions: Directions,
    table: dict[str, Any],
    scored: tuple[int, int] | None,
    layers: tuple[int, int] | None,
    record: dict[str, Any],
    clock: Clock,
) -> tuple[tuple[int, int], tuple[int, int], dict[str, Any]]:
    """What the config leaves open, chosen on the calibration prompts; adds the curves to `record`."""
    if config.alpha is not None:
        raise ValueError("config.alpha needs config.layers, config.scored and config.threshold; else give alpha_rel")
    prompts, harmful = labelled(roles.calibration)
    if len(set(harmful)) < 2:
        raise ValueError("calibration needs harmful and safe prompts; config.calibration has one kind only")
    with clock.stage("classifier_s"), progress_bar("classifier on calibration prompts", len(prompts)) as done:
        reading = read_prompts(model, directions, prompts, config.batch_size, done)
    if scored is None:
        scored, _ = choose_classifier(reading.cosines, harmful)
    scores = reading.cosines[:, scored[0] : scored[1]].mean(1)
    threshold = config.threshold
    if threshold is None and config.threshold_by == "roc":
        threshold = best_threshold(scores, harmful)
    elif config.threshold_by not in ("roc", "outcome"):
        raise ValueError(f"config.threshold_by {config.threshold_by!r} is not known; use 'outcome' or 'roc'")

    ranges = [layers] if layers else layer_candidates(model.config.layers, table)
    grid = [config.alpha_rel] if config.alpha_rel is not None else list(config.alpha_grid)
    settings = [(r, a) for r in ranges for a in grid]
    decoding = Decoding(config.calibration_tokens, seed=config.seed, batch_size=config.batch_size)
    rules = judge(config.judge)
    with clock.stage("strength_s"), progress_bar("layers and strength", len(prompts) * len(settings)) as done:
        limits = (config.kl_limit, config.max_drop, threshold, done)
        chosen, tried = calibrate(
            model, directions, scored, settings, prompts, harmful, scores, rules, decoding, *limits
        )
    record["directions"]["separation"] = separation(reading, harmful)
    record["classifier"] = {
        "calibration": {"scores": scores, "harmful": harmful},
        "roc": roc(scores, harmful),
    }
    rows = [
        dataclasses.asdict(c)
        | {
            "alpha": c.alpha_rel * float(directions.residual_norm[c.layers[0] : c.layers[1]].mean()),
            "balanced_accuracy": c.balanced_accuracy,
            "allowed": c.kl_benign <= config.kl_limit,
            "chosen": c == chosen,
        }
        for c in tried
    ]
    record["strength"] = {
        "limit": {"kind": "kl", "value": config.kl_limit},
        "max_drop": config.max_drop,
        "candidates": rows,
        "n": len(prompts),
    }
    return scored, chosen.layers, {"alpha": None, "alpha_rel": chosen.alpha_rel, "threshold": chosen.threshold}


def load_prepared(path: str | os.PathLike, model: ChatModel) -> Prepared:
    """A steering saved by an earlier run of the same model."""
    steering, metadata = load_steering(path, model.config_sha256())
    return Prepared(steering, float(steering.threshold), metadata.get("record", {}), metadata["choice"])


def prepare_key(config: ConfigDict, model: ChatModel, roles: Roles) -> str:
    """Digest of what directions and calibration depend on."""
    sets = [s.sha256 for s in (*roles.anchors, *roles.calibration)]
    later = ("evaluation", "data", "max_new_tokens", "repetition_penalty", "text", "passages", "batch_size", "mesh")
    settings = {name: value for name, value in config.to_dict().items() if name not in later}
    content = [model.fingerprint(), sets, plain(settings)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def prepare_once(config: ConfigDict, model: ChatModel, roles: Roles, out: pathlib.Path, clock: Clock) -> Prepared:
    """`prepare`, or what an earlier run of the same experiment left in `out`."""
    path, key = out / "vectors.safetensors", prepare_key(config, model, roles)
    if path.is_file():
        try:
            if load_steering(path)[1].get("key") == key:
                return load_prepared(path, model)
        except ValueError:
            pass  # of another experiment: it is made anew and replaced
    prepared = prepare(config, model, roles, clock)
    save_vectors(out, model, prepared, key)
    return prepared


def run(config: ConfigDict, model: ChatModel, roles: Roles, out: pathlib.Path, clock: Clock) -> dict[str, Any]:
    """The whole experiment; what it found is in `out` and in the returned record."""
    rules = judge(config.judge)
    texts = load_passages(config.text, config.passages) if config.text else builtin_prose()[: config.passages]
    check_lengths(config, model, roles, texts)
    if config.vectors:
        prepared = load_prepared(config.vectors, model)
        save_vectors(out, model, prepared, key="")
    else:
        prepared = prepare_once(config, model, roles, out, clock)
    decoding = Decoding(
        config.max_new_tokens,
        Sampling(repetition_penalty=config.repetition_penalty),
        config.seed,
        config.batch_size,
    )
    samples: list[dict[str, Any]] = []
    with clock.stage("answers_s"), progress_bar("answers before and after", sum(map(len, roles.evaluation))) as done:
        log = out / "answers.jsonl"
        for prompts in roles.evaluation:
            answers, new = answer_prompts(model, prepared.steering, prompts.prompts, decoding, log, done)
            if new:  # both answers share one prefill
                read = sum(len(row.ids) for row in model.rows(prompts.prompts))
                clock.count("answers_s", Tokens(read=read, written=new))
            samples += judged(prompts, answers, prepared.threshold, rules)
    affirmative = affirmative_ids(model)
    with clock.stage("perplexity_s"), progress_bar("perplexity", len(texts)) as done:
        both = unsteered(prepared.steering), prepared.steering
        (before, after), n = perplexities(model, both, affirmative, texts, config.batch_size, done)

    table = comparisons(samples)
    record = environment() | {
        "task": "scans",
        "model": model_record(model),
        "config": config.to_dict(),
        "choice": prepared.metadata,
        "seed": config.seed,
        "generation": {"max_new_tokens": config.max_new_tokens, "repetition_penalty": config.repetition_penalty},
        "chat_template_sha256": model.template_sha256,
        "datasets": [data_record(s, role) for role, sets in vars(roles).items() for s in sets],
        "judge": {"name": rules.name, "version": rules.version},
        "metrics": metrics(table, rules),
        "comparisons": table,
        "average": average(samples),
        "perplexity": {"before": before, "after": after, "n_tokens": n, "text": config.text or "built-in prose"},
        "timings": clock.record(model.config, config.batch_size),
        "files": {"vectors": "vectors.safetensors", "samples": "samples.jsonl"},
        **prepared.record,
    }
    record["classifier"] = classifier_record(samples, prepared, record.get("classifier", {}))
    write_run(out, record, samples)
    write_report(out)
    return record


def check_lengths(config: ConfigDict, model: ChatModel, roles: Roles, texts: Sequence[str]) -> None:
    """Raises ValueError, before any work is done, for a prompt or a text that the model's context cannot hold."""
    for prompts in (*roles.anchors, *roles.calibration, *roles.evaluation):
        check_context(model.rows(prompts.prompts), model.config.context, config.max_new_tokens)
    check_context(halves(model, texts), model.config.context, len(affirmative_ids(model)))


def classifier_record(samples: list[dict[str, Any]], prepared: Prepared, calibration: dict[str, Any]) -> dict[str, Any]:
    """How the classifier did on the evaluation prompts that have a label."""
    told = [s for s in samples if s["harmful"] is not None]
    scores, labels = [s["score"] for s in told], [s["harmful"] for s in told]
    found = classification(scores, labels, prepared.threshold).as_dict() if told else {}
    return {**found, "layers": prepared.metadata["scored"], "test": {"scores": scores, "harmful": labels}} | calibration


def save_vectors(out: pathlib.Path, model: ChatModel, prepared: Prepared, key: str) -> None:
    """The steering as safetensors, with how it came about, and as a GGUF control vector toward refusal."""
    out.mkdir(parents=True, exist_ok=True)
    metadata = {
        "model": model.name,
        "model_sha256": model.config_sha256(),
        "chat_template_sha256": model.template_sha256,
        "affirmative": AFFIRMATIVE,
        "choice": prepared.metadata,
        "record": plain(prepared.record),
        "key": key,
    }
    save_steering(out / "vectors.safetensors", prepared.steering, metadata)
    if not np.asarray(prepared.steering.strength)[0]:
        save_control_vector(out / "refusal.control.gguf", prepared.steering, model.config.family)


def show(record: dict[str, Any], out: pathlib.Path) -> None:
    """Prints the result as a table."""
    table = Table(title=f"Refusals before and after SCANS, {record['model']['name']}, judge {record['judge']['name']}")
    for column in ("prompts", "n", "before", "after", "p (McNemar)"):
        table.add_column(column, justify="left" if column == "prompts" else "right")
    for row in record["comparisons"]:
        before, after = (command.percent(row[when], 1) for when in ("before", "after"))
        table.add_row(row["label"], str(row["before"]["n"]), before, after, f"{row['mcnemar']['p_value']:.2g}")
    p = record["perplexity"]
    change = f"{100 * (p['after'] / p['before'] - 1):+.1f}%"
    row_after = f"{p['after']:.2f} ({change})"
    table.add_row(f"perplexity, {p['text']}", str(p["n_tokens"]), f"{p['before']:.2f}", row_after, "")
    command.console.print(table)
    choice = record["choice"]
    strength = f"alpha_rel {choice['alpha_rel']}" if choice["alpha"] is None else f"alpha {choice['alpha']}"
    command.console.print(
        f"steered layers {choice['layers'][0]} to {choice['layers'][1] - 1} with {strength}; "
        f"harmful from score {choice['threshold']:.3f} on",
        soft_wrap=True,
    )
    command.console.print(use_line(record["timings"]), soft_wrap=True)
    for name in ("report.html", "run.json", "samples.jsonl", "vectors.safetensors"):
        command.console.print(f"  {out / name}", soft_wrap=True)


def load(config: ConfigDict) -> ChatModel:
    """The model that the config names, on the mesh that it names or that suits the devices."""
    mesh = command.mesh_of(config.mesh, config.model, config.dtype)
    return load_chat_model(
        config.model,
        dtype=config.dtype,
        mesh=mesh,
        template=config.chat_template,
        system=config.system,
        raw=config.raw,
    )


def roles_of(config: ConfigDict, extra: Sequence[PromptSet] = ()) -> Roles:
    """The prompt sets of the config, each prompt in one role."""
    prepares = () if config.vectors else config.anchors
    calibrates = () if config.vectors else config.calibration
    return assign_roles(prepares, calibrates, config.evaluation, config.data or None, extra, config.seed)


def main() -> None:
    """Reads the flags and runs the experiment."""
    config, clock = CONFIG.value, Clock()
    command.console.print(banner())
    roles = roles_of(config)
    with clock.stage("load_s"):
        model = load(config)
    with command.results(OUT.value) as out:
        show(run(config, model, roles, out, clock), out)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", "configs/scans/smollm2_135m.py", "the experiment")
    OUT = flags.DEFINE_string("out", "runs/scans", "folder for the results; an interrupted run goes on from there")
    command.run(main)
