"""Brittleness of a chat model's safety: which weights and ranks carry it, and what is left without them.

python -m launch.brittleness --config=configs/brittleness/llama2_7b_chat.py --out=runs/llama2 --config.data=DATA_FOLDER
"""

import functools
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from jaxsafe.chat.model import ChatModel
from jaxsafe.configs.brittleness.base import FIELDS
from jaxsafe.io.hf import save_hf
from jaxsafe.io.hub import located
from jaxsafe.io.masks import save_mask
from jaxsafe.kernels.lowrank import energy_shares, subspace_similarity
from jaxsafe.kernels.selection import jaccard, top
from jaxsafe.methods.brittleness import (
    METHODS,
    RANKS,
    SIDES,
    Material,
    Point,
    Protocol,
    check_blocks,
    edited,
    noise,
    points,
    removed,
)
from jaxsafe.parallel import fetch
from jaxsafe.records.brittleness import Details, Energy, Overlap, Similarity
from jaxsafe.records.run import Run
from jaxsafe.study.study import Study

from . import command, common, folder
from .progress import Clock
from .settings import Experiment

CARD = """---
tags: [jaxsafe, safety-research]
---
{model} after the edit "{point}" (arXiv 2402.05162), made with jaxsafe to study how brittle its safety is. It may
comply with harmful requests; do not deploy it.
"""


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that contradict each other, FileNotFoundError for what is not there."""
    common.check(config)
    grid = grid_of(config)
    if not any(config[name] for name in METHODS):
        raise ValueError(f"the grid is empty; give a point in one of {', '.join(f'config.{name}' for name in METHODS)}")
    for n, m in config.n_of_m:
        if n > m:
            raise ValueError(f"config.n_of_m {(n, m)} takes {n} of each {m} weights; need n <= m")
    for field in ("by_row", "sequential"):
        if config[field] and not any(config[method] for method in config[field]):
            raise ValueError(f"config.{field} names {', '.join(config[field])}, of which there is no point; give one")
    common.check_scored(config)
    for point in grid:
        check_blocks(common.score_settings(config), point, bool(config.base_model))


def grid_of(config: ConfigDict) -> list[Point]:
    """The dense model and every point with its controls. Raises ValueError for an export that is none of them."""
    how = Protocol(tuple(config.by_row), tuple(config.sequential), tuple(config.controls_by))
    grid = points({name: tuple(config[name]) for name in METHODS}, config.controls, how)
    if config.export and config.export not in {point.name for point in grid}:
        raise ValueError(f"config.export {config.export!r} is no point; there are {[p.name for p in grid]}")
    return grid


def results(config: ConfigDict) -> int:
    """How many results the experiment has."""
    return len(grid_of(config))


def run(config: ConfigDict, model: ChatModel, out: pathlib.Path, clock: Clock) -> Run:
    """The whole experiment; what it finds is in `out` and in the returned record."""
    grid = grid_of(config)
    common.check_ranks(config, RANKS, model)
    if config.heads and max(config.heads) > (there := model.config.layers * model.config.heads):
        raise ValueError(f"config.heads {max(config.heads)}: the model has {there} heads")
    roles = common.scored_roles(config)
    exam = common.exam(config, model, common.evaluated(roles), common.settings(config))
    study = Study(out, model, exam, clock.watch("exam_s"))
    study.check()
    material = common.material(config, model, roles, study.store, clock)

    for point in grid:
        make = functools.partial(changed, material, point)
        study.examine(point.variant(material, config.controls, config.controls_by[0]), make)

    details = details_of(config, material, grid)
    record = common.finish(study, "brittleness", config, roles, clock, details)
    for point in (point for point in grid if point.name == config.export):
        export(config, material, point, out)
    return record


def changed(material: Material, point: Point) -> ChatModel:
    """The material's model after the edit."""
    return material.model.with_params(edited(material, point)[0])


def details_of(config: ConfigDict, material: Material, grid: Sequence[Point]) -> Details:
    """Where safety and utility meet, and what each point removes in each layer."""
    counts = {side: len(material.rows(side)) for side in SIDES if any(side in point.sides for point in grid)}
    found = {point.name: removed(material, point) for point in grid}
    sparsity = {name: {k: tuple(v) for k, v in each["layers"].items()} for name, each in found.items() if each}
    overlap = similarity = energy = None
    if any(point.method in ("set_difference", "top", "bottom") for point in grid):
        overlap = Overlap(config.jaccard_fraction, joined(best_shared(config, part) for part in material.parts()))
    if any(point.of_ranks for point in grid):
        rank = config.similarity_rank
        similarity = Similarity(rank, joined(similar(part, rank) for part in material.parts()))
        width = material.config.embed
        ranks = (*(k for k in (2**i for i in range(14)) if k < width), width)
        energy = Energy(ranks, *(curve(material, side, ranks) for side in SIDES))
    noisy = {point.name: share for point in grid if (share := noise(material, point))}
    for name, share in noisy.items():
        command.say(f"{name}: in {share:.0%} of the maps the ranks end among directions that float32 cannot tell apart")
    return Details(counts, sparsity, overlap, similarity, energy, noisy)


def by_map(values: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """{"layers/q": [L]} as {"q": a tuple of floats}."""
    return {path.split("/")[-1]: tuple(map(float, fetch(array))) for path, array in values.items()}


def joined(parts: Iterable[dict[str, tuple[float, ...]]]) -> dict[str, tuple[float, ...]]:
    """The numbers of some layers each as those of all, by map."""
    every = list(parts)
    return {name: tuple(itertools.chain.from_iterable(part[name] for part in every)) for name in every[0]}


def best_shared(config: ConfigDict, part: Material) -> dict[str, tuple[float, ...]]:
    """The overlap of the weights that matter most to safety and to utility, by map and layer."""
    best = (top(part.config, part.scores(side), config.jaccard_fraction) for side in SIDES)
    return by_map(jaccard(*best))


def similar(part: Material, rank: int) -> dict[str, tuple[float, ...]]:
    """The similarity of the subspaces that safety and utility use most, by map and layer."""
    safety, utility = (part.bases(side) for side in SIDES)
    return by_map(subspace_similarity(safety, utility, rank))


def curve(material: Material, side: str, ranks: Sequence[int]) -> dict[str, tuple[float, ...]]:
    """The share of a map's output energy in its first ranks, the mean over layers."""
    parts = [energy_shares(part.bases(side)) for part in material.parts()]
    shares = by_map({path: jnp.mean(jnp.concatenate([part[path] for part in parts]), 0) for path in parts[0]})
    return {name: tuple(share[min(k, len(share)) - 1] for k in ranks) for name, share in shares.items()}


def export(config: ConfigDict, material: Material, point: Point, out: pathlib.Path) -> None:
    """Writes the model at `point` as a Hugging Face folder, and the mask of what it lost."""
    model = material.model
    params, mask = edited(material, point)
    like = located(common.named(config))[0] if config.model else None
    save_hf(out / "export", model.config, params, like=like, card=CARD.format(model=model.name, point=point.name))
    if mask is not None:
        save_mask(out / "mask.safetensors", model.config, mask, {"point": point.name, "model": model.fingerprint()})


def main() -> None:
    """Reads the flags and runs the experiment."""
    config = command.config()
    with common.held(OUT.value, folder.identity("brittleness", FIELDS, config), results(config)) as (out, clock):
        model = common.load(config, clock)
        common.show(run(config, model, out, clock), out)


if __name__ == "__main__":
    OUT = flags.DEFINE_string(
        "out", "runs/brittleness", "folder for the results; an interrupted run goes on from there"
    )
    command.run(main, Experiment("configs/brittleness/smollm2_135m.py", FIELDS, check))
