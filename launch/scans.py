"""SCANS on any supported chat model: directions, calibration, refusals before and after, vectors, report.

python -m launch.scans --config=configs/scans/llama2_7b_chat.py --out=runs/llama2 --config.data=DATA_FOLDER
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jaxsafe.evaluation.comparison import average, comparisons, judged, metrics
from jaxsafe.evaluation.judges import judge
from jaxsafe.evaluation.metrics import classification, roc
from jaxsafe.evaluation.perplexity import builtin_prose, load_passages, perplexity
from jaxsafe.evaluation.record import data_record, environment, model_record, write_run
from jaxsafe.io.chat_model import ChatModel, load_chat_model
from jaxsafe.kernels.sampling import Sampling
from jaxsafe.kernels.steering import Steering
from jaxsafe.methods.scans import (
    AFFIRMATIVE,
    Decoding,
    affirmative_ids,
    find_directions,
    read_prompts,
    separation,
    steering_of,
    unsteered,
    vocabulary,
)
from jaxsafe.methods.scans_answers import answer_prompts
from jaxsafe.methods.scans_calibration import (
    choose_classifier,
    choose_strength,
    layer_candidates,
    try_candidates,
)
from jaxsafe.methods.vectors import load_steering, save_control_vector, save_steering
from jaxsafe.parallel import banner, parse_mesh
from jaxsafe.report.html import write_report
from jaxsafe.text.datasets import PromptSet
from jaxsafe.text.roles import Roles, assign_roles, labelled
from launch import command


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Any]:
    """A bar of `total` steps; yields a function that hears of n more steps."""
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=command.console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)


@dataclasses.dataclass
class Clock:
    """Seconds by stage, for the record of a run."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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
    batch_size = config.batch_size
    harmful, labels = labelled(roles.anchors)
    anchors = {side: [p for p, h in zip(harmful, labels, strict=True) if h is side] for side in (True, False)}
    if not anchors[True] or not anchors[False]:
        raise ValueError(f"anchors need harmful and benign prompts; got {len(anchors[True])} and {len(anchors[False])}")
    total = len(labels)
    with clock.stage("directions_s"), progress_bar("refusal directions", total) as done:
        directions = find_directions(model, anchors[True], anchors[False], batch_size, done)
        table = vocabulary(model, directions)
    record: dict[str, Any] = {"vocabulary": table, "directions": {"norm": directions.norm}}
    record["directions"]["residual_norm"] = directions.residual_norm

    scored, layers = as_range(config.scored, "scored"), as_range(config.layers, "layers")
    threshold, alpha, alpha_rel = config.threshold, config.alpha, config.alpha_rel
    needs_classifier = scored is None or threshold is None
    needs_strength = layers is None or (alpha is None and alpha_rel is None)
    if needs_classifier or needs_strength:
        prompts, harmful_labels = labelled(roles.calibration)
        if len(set(harmful_labels)) < 2:
            raise ValueError("calibration needs harmful and safe prompts; config.calibration has one kind only")
        with clock.stage("classifier_s"), progress_bar("classifier on calibration prompts", len(prompts)) as done:
            reading = read_prompts(model, directions, prompts, batch_size, done)
        if needs_classifier:
            scored, threshold = choose_classifier(reading.cosines, harmful_labels)
        assert scored is not None and threshold is not None
        scores = reading.cosines[:, scored[0] : scored[1]].mean(1)
        record["directions"]["separation"] = separation(reading, harmful_labels)
        record["classifier"] = {
            "calibration": {"scores": scores, "harmful": harmful_labels},
            "roc": roc(scores, harmful_labels),
        }
    if needs_strength:
        assert scored is not None and threshold is not None
        chosen, record["strength"] = calibrate_strength(config, model, directions, roles, scored, threshold, clock)
        layers, alpha, alpha_rel = chosen.layers, None, chosen.alpha_rel
    assert scored is not None and threshold is not None and layers is not None
    steering = steering_of(directions, scored, threshold, layers, alpha, alpha_rel)
    choice = {"scored": list(scored), "threshold": threshold, "layers": list(layers), "alpha": alpha}
    return Prepared(steering, float(threshold), record, choice | {"alpha_rel": alpha_rel})


def calibrate_strength(
    config: ConfigDict,
    model: ChatModel,
    directions: Any,
    roles: Roles,
    scored: tuple[int, int],
    threshold: float,
    clock: Clock,
) -> tuple[Any, dict[str, Any]]:
    """The chosen candidate, and all of them in the terms of `run.json`."""
    share = [s.take(min(len(s), config.calibration_prompts), config.seed) for s in roles.calibration]
    prompts, labels = labelled(share)
    fixed = as_range(config.layers, "layers")
    table = vocabulary(model, directions)
    ranges = [fixed] if fixed else layer_candidates(model.config.layers, table)
    grid = [config.alpha_rel] if config.alpha_rel is not None else list(config.alpha_grid)
    candidates = [(r, a) for r in ranges for a in grid]
    decoding = Decoding(config.calibration_tokens, seed=config.seed, batch_size=config.batch_size)
    with clock.stage("strength_s"), progress_bar("layers and strength", len(prompts) * len(candidates)) as done:
        tried = try_candidates(
            model,
            directions,
            scored,
            threshold,
            candidates,
            prompts,
            labels,
            judge(config.judge),
            decoding,
            done,
        )
    chosen = choose_strength(tried, config.kl_limit)
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
    return chosen, {"limit": {"kind": "kl", "value": config.kl_limit}, "candidates": rows, "n": len(prompts)}


def load_prepared(path: str, model: ChatModel) -> Prepared:
    """A steering saved by an earlier run of the same model."""
    steering, metadata = load_steering(path, model.config_sha256())
    return Prepared(steering, float(steering.threshold), {}, metadata["choice"])


def run(config: ConfigDict, model: ChatModel, roles: Roles, out: pathlib.Path, clock: Clock) -> dict[str, Any]:
    """The whole experiment; what it found is in `out` and in the returned record."""
    rules = judge(config.judge)
    prepared = load_prepared(config.vectors, model) if config.vectors else prepare(config, model, roles, clock)
    decoding = Decoding(
        config.max_new_tokens,
        Sampling(repetition_penalty=config.repetition_penalty),
        config.seed,
        config.batch_size,
    )
    samples: list[dict[str, Any]] = []
    tokens = 0
    with clock.stage("answers_s"), progress_bar("answers before and after", sum(map(len, roles.evaluation))) as done:
        log = out / "answers.jsonl"
        for prompts in roles.evaluation:
            answers, new = answer_prompts(model, prepared.steering, prompts.prompts, decoding, log, done)
            tokens += new
            samples += judged(prompts, answers, prepared.threshold, rules)
    texts = load_passages(config.text, config.passages) if config.text else builtin_prose()[: config.passages]
    affirmative = affirmative_ids(model)
    with clock.stage("perplexity_s"), progress_bar("perplexity", 2 * len(texts)) as done:
        before, n = perplexity(model, unsteered(prepared.steering), affirmative, texts, config.batch_size, done)
        after, _ = perplexity(model, prepared.steering, affirmative, texts, config.batch_size, done)

    save_vectors(out, model, prepared)
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
        "timings": clock.seconds | {"new_tokens": tokens, "tokens_per_s": tokens / clock.seconds["answers_s"]},
        "files": {"vectors": "vectors.safetensors", "samples": "samples.jsonl"},
        **prepared.record,
    }
    record["classifier"] = classifier_record(samples, prepared, record.get("classifier", {}))
    write_run(out, record, samples)
    write_report(out)
    return record


def classifier_record(samples: list[dict[str, Any]], prepared: Prepared, calibration: dict[str, Any]) -> dict[str, Any]:
    """How the classifier did on the evaluation prompts that have a label."""
    told = [s for s in samples if s["harmful"] is not None]
    scores, labels = [s["score"] for s in told], [s["harmful"] for s in told]
    found = classification(scores, labels, prepared.threshold).as_dict() if told else {}
    return {**found, "layers": prepared.metadata["scored"], "test": {"scores": scores, "harmful": labels}} | calibration


def save_vectors(out: pathlib.Path, model: ChatModel, prepared: Prepared) -> None:
    """The steering as safetensors, and as a GGUF control vector toward refusal."""
    metadata = {
        "model": model.name,
        "model_sha256": model.config_sha256(),
        "chat_template_sha256": model.template_sha256,
        "affirmative": AFFIRMATIVE,
        "choice": prepared.metadata,
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
        before, after = (_percent(row[when]) for when in ("before", "after"))
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
        f"harmful from score {choice['threshold']:.3f} on; {record['timings']['tokens_per_s']:.0f} new tokens/s"
    )
    for name in ("report.html", "run.json", "samples.jsonl", "vectors.safetensors"):
        command.console.print(f"  {out / name}")


def _percent(rate: dict[str, Any]) -> str:
    if rate["value"] is None:
        return "-"
    return f"{100 * rate['value']:.1f}% [{100 * rate['ci_low']:.0f}, {100 * rate['ci_high']:.0f}]"


def load(config: ConfigDict) -> ChatModel:
    """The model that the config names, on the mesh that it names."""
    mesh = parse_mesh(config.mesh) if config.mesh else None
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
    config, out, clock = CONFIG.value, pathlib.Path(OUT.value), Clock()
    command.console.print(banner())
    roles = roles_of(config)
    with clock.stage("load_s"):
        model = load(config)
    show(run(config, model, roles, out, clock), out)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", "configs/scans/smollm2_135m.py", "the experiment")
    OUT = flags.DEFINE_string("out", "runs/scans", "folder for the results; an interrupted run goes on from there")
    command.run(main)
