"""Brittleness of a chat model's safety: which weights and ranks carry it, and what is left without them.

python -m launch.brittleness --config=configs/brittleness/llama2_7b_chat.py --out=runs/llama2 --config.data=DATA_FOLDER
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxsafe.chat.model import ChatModel
from jaxsafe.io.hf import save_hf
from jaxsafe.io.hub import resolve
from jaxsafe.io.masks import save_mask
from jaxsafe.kernels.lowrank import energy_shares, subspace_similarity
from jaxsafe.kernels.selection import jaccard, top
from jaxsafe.methods.brittleness import METHODS, SIDES, Material, Point, edited, points, removed
from jaxsafe.parallel import fetch
from jaxsafe.records.brittleness import Details, Energy, Overlap, Similarity
from jaxsafe.records.run import Run
from jaxsafe.study.study import Study

from . import command, common
from .progress import Clock

CARD = """---
tags: [jaxsafe, safety-research]
---
{model} after the edit "{point}" (arXiv 2402.05162), made with jaxsafe to study how brittle its safety is. It may
comply with harmful requests; do not deploy it.
"""


def run(config: ConfigDict, model: ChatModel, out: pathlib.Path, clock: Clock) -> Run:
    """The whole experiment; what it finds is in `out` and in the returned record."""
    grid = points({name: tuple(config[name]) for name in METHODS}, config.controls)
    exports = [point for point in grid if point.name == config.export]
    if config.export and not exports:
        raise ValueError(f"config.export {config.export!r} is no point; there are {[p.name for p in grid]}")
    roles = common.scored_roles(config)
    exam = common.exam(config, model, common.evaluated(roles), common.settings(config))
    study = Study(out, model, exam, clock.watch("exam_s"))
    study.check()
    material = common.material(config, model, roles, study.store, clock)

    for point in grid:
        make = functools.partial(changed, material, point)
        study.examine(point.variant(material, config.controls), make)

    details = details_of(config, material, grid)
    record = common.finish(study, "brittleness", config, roles, clock, details)
    for point in exports:
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
        best = (top(material.config, material.scores(side), config.jaccard_fraction) for side in SIDES)
        overlap = Overlap(config.jaccard_fraction, by_map(jaccard(*best)))
    if any(point.of_ranks for point in grid):
        safety, utility = (material.bases(side) for side in SIDES)
        similar = subspace_similarity(safety, utility, config.similarity_rank)
        similarity = Similarity(config.similarity_rank, by_map(similar))
        width = material.config.embed
        ranks = (*(k for k in (2**i for i in range(14)) if k < width), width)
        energy = Energy(ranks, curve(safety, ranks), curve(utility, ranks))
    return Details(counts, sparsity, overlap, similarity, energy)


def by_map(values: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """{"layers/q": [L]} as {"q": a tuple of floats}."""
    return {path.split("/")[-1]: tuple(map(float, fetch(array))) for path, array in values.items()}


def curve(bases: Any, ranks: Sequence[int]) -> dict[str, tuple[float, ...]]:
    """The share of a map's output energy in its first ranks, the mean over layers."""
    shares = by_map({path: jnp.mean(share, 0) for path, share in energy_shares(bases).items()})
    return {name: tuple(share[min(k, len(share)) - 1] for k in ranks) for name, share in shares.items()}


def export(config: ConfigDict, material: Material, point: Point, out: pathlib.Path) -> None:
    """Writes the model at `point` as a Hugging Face folder, and the mask of what it lost."""
    model = material.model
    params, mask = edited(material, point)
    like = resolve(config.model) if config.model else None
    save_hf(out / "export", model.config, params, like=like, card=CARD.format(model=model.name, point=point.name))
    if mask is not None:
        save_mask(out / "mask.safetensors", model.config, mask, {"point": point.name, "model": model.fingerprint()})


def main() -> None:
    """Reads the flags and runs the experiment."""
    config, clock = CONFIG.value, Clock()
    common.greet()
    with clock.watch("load_s")(f"loading {config.model}", 0):
        model = common.load(config)
    with command.results(OUT.value) as out:
        common.show(run(config, model, out, clock), out)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", "configs/brittleness/smollm2_135m.py", "the experiment")
    OUT = flags.DEFINE_string(
        "out", "runs/brittleness", "folder for the results; an interrupted run goes on from there"
    )
    command.run(main)
