"""Brittleness of a chat model's safety: which weights and ranks carry it, and what is left without them.

python -m launch.brittleness --config=configs/brittleness/llama2_7b_chat.py --out=runs/llama2 --config.data=DATA_FOLDER
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, config_flags
from rich.table import Table

from jaxsafe.evaluation.attack_settings import Setting, load_suffixes, setting, under
from jaxsafe.evaluation.fluency import text_rows
from jaxsafe.evaluation.judges import judge
from jaxsafe.evaluation.perplexity import builtin_prose, load_passages
from jaxsafe.evaluation.record import data_record, environment, model_record, plain, write_run
from jaxsafe.evaluation.utilisation import Tokens
from jaxsafe.io.atomic import write_text
from jaxsafe.io.chat_model import ChatModel, load_chat_model
from jaxsafe.io.hf import save_hf
from jaxsafe.io.hub import resolve
from jaxsafe.io.journal import add_entry, read_journal
from jaxsafe.io.masks import save_mask
from jaxsafe.kernels.importance import snip_scores, wanda_scores
from jaxsafe.kernels.lowrank import act_svd, energy_shares, subspace_similarity
from jaxsafe.kernels.selection import jaccard, layer_shares, magnitude, random_scores, sparsity, top, weight_difference
from jaxsafe.methods.attribution_data import draw, own_answers, pairs_from_file
from jaxsafe.methods.brittleness import (
    DENSE,
    METHODS,
    Material,
    Point,
    edited,
    family,
    mean_ranks,
    once,
    points,
)
from jaxsafe.methods.brittleness_evaluation import Examination, against, examine, refusals, tokens_of
from jaxsafe.methods.heads import head_accuracies, ranking
from jaxsafe.methods.sequential import Change, change_blocks
from jaxsafe.methods.statistics import data_sha256, gather_once
from jaxsafe.parallel import banner, fetch
from jaxsafe.report.html import write_report
from jaxsafe.text.batches import Row
from jaxsafe.text.chat import check_context
from jaxsafe.text.datasets import PromptSet
from jaxsafe.text.roles import Roles, assign_roles
from launch import command
from launch.progress import Clock, progress_bar, use_line

SCORES = ("snip", "wanda", "magnitude", "weight_difference", "random")
SIDES = ("safety", "utility")
CARD = """---
tags: [jaxsafe, safety-research]
---
{model} after the edit "{point}" (arXiv 2402.05162), made with jaxsafe to study how brittle its safety is. It may
comply with harmful requests; do not deploy it.
"""


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows that scores are made from, and the prompt sets that they and the evaluation come from."""

    safety: list[Row]
    utility: list[Row]
    roles: Roles
    harmless: tuple[PromptSet, ...]


def roles_of(config: ConfigDict) -> tuple[Roles, tuple[PromptSet, ...]]:
    """Prompt sets by role (scored for safety, scored for utility, evaluated) and the harmless ones to evaluate.

    No prompt is both scored and evaluated. Pairs from files have no roles.
    """
    safety, utility = (() if getattr(config, f"{side}_pairs") else tuple(getattr(config, side)) for side in SIDES)
    evaluation = (*config.evaluation, *config.harmless)
    roles = assign_roles(safety, utility, evaluation, config.data or None, (), config.seed)
    n = len(config.evaluation)
    harmful, harmless = roles.evaluation[:n], roles.evaluation[n:]
    if not harmful:
        raise ValueError("config.evaluation is empty; name at least one set of harmful prompts")
    return dataclasses.replace(roles, evaluation=harmful), harmless


def scored_rows(
    config: ConfigDict, model: ChatModel, side: str, sets: Sequence[PromptSet], out: pathlib.Path, clock: Clock
) -> list[Row]:
    """The rows of one side ("safety" or "utility"), from a file or answered by the model and kept in `out`."""
    if file := getattr(config, f"{side}_pairs"):
        return draw(pairs_from_file(model, file, config.raw_pairs), config.samples, config.seed)
    prompts = [p for s in sets for p in s.prompts]
    if not prompts:
        raise ValueError(f"config.{side} is empty; name prompt sets, or a file of prompts with responses")
    log = out / "scores" / f"{side}.json"
    made_from = [model.fingerprint(), prompts, config.answer_tokens, config.judge]
    wanted = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    kept = json.loads(log.read_text()) if log.is_file() else {}
    if kept.get("key") != wanted:
        with clock.stage("own_answers_s"), progress_bar(f"own answers, {side}", len(prompts)) as done:
            refused = side == "safety"
            rules = judge(config.judge)
            rows = own_answers(model, prompts, rules, refused, config.answer_tokens, config.batch_size, done)
        kept = {"key": wanted, "rows": [[list(row.ids), row.instruction_end] for row in rows]}
        write_text(log, json.dumps(kept))
    return draw([Row(tuple(ids), end) for ids, end in kept["rows"]], config.samples, config.seed)


def material_of(config: ConfigDict, model: ChatModel, data: Data, out: pathlib.Path, clock: Clock) -> Material:
    """Scores, bases and the ranking of heads, each made when a point needs it and kept in `out/scores`."""
    base = None
    if config.base_model:
        base = load_chat_model(config.base_model, config.dtype, model.mesh, raw=True)
        if base.config_sha256() != model.config_sha256():
            raise ValueError(f"config.base_model {config.base_model!r} has another architecture than {model.name}")
    fingerprint = model.fingerprint()

    def statistics(kind: str, side: str, rows: list[Row]) -> Any:
        path = out / "scores" / f"{kind}_{side}.safetensors"
        if not path.is_file():
            n = sum(len(row.ids) for row in rows)
            clock.count(f"{kind}_s", Tokens(learned=n) if kind == "snip" else Tokens(read=n))
        with clock.stage(f"{kind}_s"), progress_bar(f"{kind}, {side}", len(rows)) as done:
            return gather_once(
                path,
                kind,
                model.config,
                model.params,
                rows,
                fingerprint,
                config.score_batch_size,
                config.positions,
                config.loss,
                model.mesh,
                done=done,
            )

    def scores(side: str, rows: list[Row]) -> Any:
        match config.score:
            case "snip" | "wanda":
                found = statistics(config.score, side, rows)
                make = snip_scores if config.score == "snip" else wanda_scores
                return make(model.config, model.params, found.sums, found.n)
            case "magnitude":
                return magnitude(model.params)
            case "weight_difference" if base is not None:
                return weight_difference(model.params, base.params)
            case "weight_difference":
                raise ValueError("config.score 'weight_difference' needs config.base_model")
            case "random":
                return random_scores(model.config, config.seed + (side == "utility"), model.mesh)
        raise ValueError(f"config.score {config.score!r} is not known; use one of {', '.join(SCORES)}")

    def bases(side: str, rows: list[Row]) -> Any:
        found = statistics("gram", side, rows)
        with clock.stage("act_svd_s"), command.console.status(f"ActSVD, {side}"):
            return act_svd(model.config, model.params, found.sums)

    def heads() -> Any:
        harmful, benign = (
            [p for s in sets for p in s.prompts] for sets in (data.roles.anchors, data.roles.calibration)
        )
        if not harmful or not benign:
            raise ValueError("config.heads needs prompt sets in config.safety and config.utility, not files of pairs")
        with clock.stage("heads_s"), command.console.status("probes of heads"):
            return ranking(head_accuracies(model, harmful, benign, config.batch_size, seed=config.seed))

    def sequential(kind: str, change: Change) -> Any:
        how = config.score_batch_size, config.positions, config.loss
        with clock.stage("sequential_s"), progress_bar(f"{kind}, block by block", model.config.layers) as done:
            return change_blocks(kind, model.config, model.params, data.safety, change, *how, done)

    return Material(
        model.config,
        model.params,
        safety=once(lambda: scores("safety", data.safety)),
        utility=once(lambda: scores("utility", data.utility)),
        safety_bases=once(lambda: bases("safety", data.safety)),
        utility_bases=once(lambda: bases("utility", data.utility)),
        heads=once(heads),
        base=None if base is None else base.params,
        per=config.per,
        sequential=sequential if config.sequential else None,
        score=config.score,
    )


def examination(
    config: ConfigDict, model: ChatModel, harmful: Sequence[PromptSet], harmless: Sequence[PromptSet]
) -> Examination:
    """What every point is put to, from the config. Raises ValueError for a prompt beyond the model's context."""
    suffixes = load_suffixes(config.suffixes) if config.suffixes else ()
    settings: list[Setting] = [setting(name, config.system, suffixes) for name in config.settings]
    if not settings or settings[0].width != 1:
        raise ValueError("config.settings must begin with one that gives one answer a prompt, such as 'vanilla'")
    texts = load_passages(config.text, config.passages) if config.text else builtin_prose()[: config.passages]
    for prompts in (*harmful, *harmless):
        for each in settings:
            asked = [text for prompt in prompts.prompts for text in each.texts(prompt)]
            check_context(under(model, each).rows(asked), model.config.context, config.max_new_tokens)
    return Examination(
        harmful,
        harmless,
        tuple(settings),
        judge(config.judge),
        text_rows(model, texts, "whole" if config.text else "halves"),
        config.max_new_tokens,
        config.fluency_answers,
        config.batch_size,
        config.seed,
    )


def sweep_key(config: ConfigDict, model: ChatModel, data: Data, exam: Examination) -> str:
    """Digest of everything that the result of a point depends on besides the point."""
    content = [
        model.fingerprint(),
        data_sha256(data.safety),
        data_sha256(data.utility),
        *exam.content,
        [config.score, config.loss, config.positions, config.per, config.base_model, config.sequential],
        [list(config.zero_shot), config.zero_shot_limit],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def sweep(
    config: ConfigDict,
    model: ChatModel,
    material: Material,
    exam: Examination,
    grid: Sequence[Point],
    log: pathlib.Path,
    key: str,
    clock: Clock,
) -> dict[str, dict[str, Any]]:
    """Every point's record and samples, {id: {"point", "samples"}}; finished ones are read from `log`."""
    found = {entry["point"]["id"]: entry for entry in read_journal(log) if entry["key"] == key}
    for number, point in enumerate(grid, 1):
        if point.name in found:
            continue
        params, mask = edited(material, point)
        record = {
            "id": point.name,
            "family": family(point, config.score),
            "control": point.control is not None,
            "parameters": point.parameters,
            "sparsity": None if mask is None else sparsity(mask),
            "ranks": mean_ranks(model.config, point),
            "layers": None if mask is None else layer_shares(mask),
        }
        bar = progress_bar(f"{number}/{len(grid)} {point.name}"[:48], exam.size)
        with clock.stage("points_s"), bar as done:
            changed = dataclasses.replace(model, params=params)
            result, samples = examine(changed, model, exam, done)
            clock.count("points_s", tokens_of(model, exam, samples))
            result["metrics"] |= zero_shot_metrics(config, changed)
        entry = plain({"key": key, "point": record | result, "samples": samples})
        add_entry(log, entry)
        found[point.name] = entry
    return {point.name: found[point.name] for point in grid}


def zero_shot_metrics(config: ConfigDict, model: ChatModel) -> dict[str, Any]:
    """Accuracies of lm-eval tasks, where the config names some."""
    if not config.zero_shot:
        return {}
    from jaxsafe.evaluation.zero_shot import zero_shot

    found = zero_shot(model, tuple(config.zero_shot), config.zero_shot_limit, config.batch_size, config.seed)
    return {f"zero_shot/{task}": value.as_dict() for task, value in found.items()}


def compared(grid: Sequence[Point], found: Mapping[str, Any], first: Setting) -> list[dict[str, Any]]:
    """The records of all points, each set against the dense model and against its first control."""
    flags = {name: refusals(entry["samples"], first) for name, entry in found.items()}
    out = []
    for point in grid:
        record = dict(found[point.name]["point"])
        controls = [p for p in grid if p.control is not None and p.original == point]
        if point != DENSE:
            record["against_dense"] = against(flags[DENSE.name], flags[point.name])
        if controls:
            record["against_control"] = against(flags[controls[0].name], flags[point.name])
            record["against_control"]["control"] = controls[0].name
        out.append(record)
    return out


def overlaps(config: ConfigDict, material: Material, grid: Sequence[Point]) -> dict[str, Any]:
    """Where safety and utility meet: Jaccard index of top weights, similarity of top ranks, energy of ranks."""
    out: dict[str, Any] = {}
    if any(not p.of_ranks and p.method in ("set_difference", "top", "bottom") for p in grid):
        share = config.jaccard_fraction
        best = (top(material.config, tree(), share) for tree in (material.safety, material.utility))
        out["overlap"] = {"jaccard": [{"fraction": share, "values": jaccard(*best)}]}
    if any(p.of_ranks for p in grid):
        safety, utility = material.safety_bases(), material.utility_bases()
        rank = config.similarity_rank
        similar = {named(k): v for k, v in subspace_similarity(safety, utility, rank).items()}
        out.setdefault("overlap", {})["similarity"] = {"rank": rank, "values": similar}
        ranks = [k for k in (2**i for i in range(14)) if k < material.config.embed] + [material.config.embed]
        out["energy"] = {"ranks": ranks, "safety": curve(safety, ranks), "utility": curve(utility, ranks)}
    return out


def named(path: str) -> str:
    """ "layers/q" as "q"."""
    return path.split("/")[-1]


def curve(bases: Any, ranks: Sequence[int]) -> dict[str, list[float]]:
    """The share of a map's output energy in its first ranks, the mean over layers."""
    shares = {named(path): fetch(jnp.mean(share, 0)) for path, share in energy_shares(bases).items()}
    return {name: [float(share[min(k, len(share)) - 1]) for k in ranks] for name, share in shares.items()}


def run(config: ConfigDict, model: ChatModel, out: pathlib.Path, clock: Clock) -> dict[str, Any]:
    """The whole experiment; what it found is in `out` and in the returned record."""
    grid = points({name: tuple(getattr(config, name)) for name in METHODS}, config.controls)
    if config.export and config.export not in {p.name for p in grid}:
        raise ValueError(f"config.export {config.export!r} is no point; there are {[p.name for p in grid]}")
    if config.score not in SCORES:
        raise ValueError(f"config.score {config.score!r} is not known; use one of {', '.join(SCORES)}")
    if config.sequential and (config.score not in ("snip", "wanda") or config.base_model):
        raise ValueError("config.sequential goes with config.score 'snip' or 'wanda' and without config.base_model")
    roles, harmless = roles_of(config)
    exam = examination(config, model, roles.evaluation, harmless)
    out.mkdir(parents=True, exist_ok=True)
    data = Data(
        scored_rows(config, model, "safety", roles.anchors, out, clock),
        scored_rows(config, model, "utility", roles.calibration, out, clock),
        roles,
        harmless,
    )
    material = material_of(config, model, data, out, clock)
    key = sweep_key(config, model, data, exam)
    found = sweep(config, model, material, exam, grid, out / "points.jsonl", key, clock)
    record = environment() | {
        "task": "brittleness",
        "model": model_record(model),
        "config": config.to_dict(),
        "seed": config.seed,
        "generation": {"max_new_tokens": config.max_new_tokens},
        "chat_template_sha256": model.template_sha256,
        "scored": {"safety": len(data.safety), "utility": len(data.utility)},
        "datasets": dataset_records(data),
        "judge": {"name": exam.judge.name, "version": exam.judge.version},
        "points": compared(grid, found, exam.settings[0]),
        **overlaps(config, material, grid),
        "timings": clock.record(model.config, config.batch_size),
        "files": {"points": "points.jsonl", "samples": "samples.jsonl"},
    }
    samples = [{"point": name, **s} for name, entry in found.items() for s in entry["samples"]]
    write_run(out, record, samples)
    write_report(out)
    if config.export:
        export(config, model, material, next(p for p in grid if p.name == config.export), out)
    return plain(record)


def dataset_records(data: Data) -> list[dict[str, Any]]:
    """Which prompts were used, and for what."""
    sides = {
        "safety scores": data.roles.anchors,
        "utility scores": data.roles.calibration,
        "harmful": data.roles.evaluation,
        "harmless": data.harmless,
    }
    return [data_record(s, role) for role, sets in sides.items() for s in sets]


def export(config: ConfigDict, model: ChatModel, material: Material, point: Point, out: pathlib.Path) -> None:
    """Writes the model at `point` as a Hugging Face folder, and the mask of what it lost."""
    params, mask = edited(material, point)
    like = resolve(config.model) if config.model else None
    save_hf(out / "export", model.config, params, like=like, card=CARD.format(model=model.name, point=point.name))
    if mask is not None:
        save_mask(out / "mask.safetensors", model.config, mask, {"point": point.name, "model": model.fingerprint()})


def show(record: Mapping[str, Any], out: pathlib.Path) -> None:
    """Prints the points as a table."""
    table = Table(title=f"Brittleness of {record['model']['name']}, judge {record['judge']['name']}")
    for column in ("point", "removed", "ASR", "harmless refused", "perplexity", "answers' perplexity"):
        table.add_column(column, justify="left" if column == "point" else "right", overflow="fold")
    for point in record["points"]:
        asr: Any = next((v for k, v in point["metrics"].items() if k.startswith("asr_")), {})
        refused: Any = next((v for k, v in point["metrics"].items() if k.startswith("refusal_")), {})
        removed = f"{100 * point['sparsity']:.2f}%" if point["sparsity"] is not None else _ranks(point["ranks"])
        fluency = point["fluency"]["answer_perplexity"]
        table.add_row(
            point["id"],
            removed,
            command.percent(asr),
            command.percent(refused),
            _number(point["perplexity"]),
            _number(fluency),
        )
    command.console.print(table)
    command.console.print(use_line(record["timings"]), soft_wrap=True)
    for name in ("report.html", "run.json", "samples.jsonl", "points.jsonl"):
        command.console.print(f"  {out / name}", soft_wrap=True)


def _ranks(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ranks"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def load(config: ConfigDict) -> ChatModel:
    """The model that the config names, on the mesh that it names or that suits the devices."""
    mesh = command.mesh_of(config.mesh, config.model, config.dtype)
    return load_chat_model(config.model, config.dtype, mesh, config.chat_template, config.system, config.raw)


def main() -> None:
    """Reads the flags and runs the experiment."""
    config, clock = CONFIG.value, Clock()
    command.console.print(banner())
    with clock.stage("load_s"):
        model = load(config)
    with command.results(OUT.value) as out:
        show(run(config, model, out, clock), out)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", "configs/brittleness/smollm2_135m.py", "the experiment")
    OUT = flags.DEFINE_string(
        "out", "runs/brittleness", "folder for the results; an interrupted run goes on from there"
    )
    command.run(main)
