"""The safety landscape of a chat model: safety and capability along random directions, and toward another model.

python -m launch.landscape --config=configs/landscape/llama2_7b_chat.py --out=runs/llama2 --config.data=DATA_FOLDER
"""

import math
import pathlib

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from jaxsafe.chat.model import ChatModel
from jaxsafe.configs.landscape.base import FIELDS
from jaxsafe.kernels.directions import difference
from jaxsafe.methods.landscape import ORIGIN, Grid, Ground, examine_slice, unsafe_answers
from jaxsafe.methods.visage import DEFINITIONS, visage
from jaxsafe.model.transformer import Params
from jaxsafe.prompts.roles import Roles, assign_roles
from jaxsafe.records.landscape import Details, Visage
from jaxsafe.records.run import Run
from jaxsafe.study.study import Study

from . import command, common, folder
from .progress import Clock
from .settings import Experiment


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that contradict each other, FileNotFoundError for what is not there."""
    common.check(config)
    if not grid_of(config).slices:
        raise ValueError("the landscape is empty; give config.steps, config.plane_steps or config.other_model")
    roles_of(config)


def grid_of(config: ConfigDict) -> Grid:
    """The points of every line and plane. Raises ValueError as `Grid` does."""
    toward = tuple(config.toward) if config.other_model else ()
    controls = config.controls if config.other_model else 0
    return Grid(config.reach, config.steps, config.plane_steps, config.draws, toward, controls, config.seed)


def roles_of(config: ConfigDict) -> Roles:
    """The prompts to evaluate. Raises ValueError where there are no harmful ones."""
    evaluate = {name: config[name] for name in ("evaluation", "harmless")}
    return assign_roles({}, evaluate, config.data or None, (), config.seed)


def results(config: ConfigDict) -> int:
    """How many results the experiment has."""
    return 1 + sum(len(along.points) for along in grid_of(config).slices)


def run(config: ConfigDict, model: ChatModel, out: pathlib.Path, clock: Clock) -> Run:
    """The whole experiment; what it finds is in `out` and in the returned record."""
    grid, roles = grid_of(config), roles_of(config)
    ground = Ground(model, config.per, common.beside(config.other_model, model))
    exam = common.exam(config, model, common.evaluated(roles), common.settings(config))
    study = Study(out, model, exam, clock.watch("exam_s"))
    study.check()

    study.examine(ORIGIN, model)
    for along in grid.slices:
        examine_slice(study, ground, along, config.together)

    return common.finish(study, "landscape", config, roles, clock, details_of(study, ground, grid))


def details_of(study: Study, ground: Ground, grid: Grid) -> Details:
    """VISAGE by both definitions, and how far the other model is."""
    lines = [along for along in grid.slices if along.kind == "random"]
    unsafe = unsafe_answers(study, lines)
    found = {name: visage(unsafe, definition) for name, definition in DEFINITIONS.items()} if unsafe.size else {}
    depths = tuple(Visage(name, *each) for name, each in found.items())
    prompts = unsafe.shape[-1] if lines else 0
    if ground.other is None:
        return Details(prompts, depths)
    return Details(prompts, depths, ground.other.name, distance(ground.model.params, ground.other.params))


def distance(params: Params, other: Params) -> float:
    """|theta' - theta| / |theta| over all weights."""

    def square(tree: Params) -> float:
        return sum(float(jnp.sum(jnp.square(leaf.astype(jnp.float32)))) for leaf in jax.tree.leaves(tree))

    return math.sqrt(square(difference(params, other)) / square(params))


def main() -> None:
    """Reads the flags and runs the experiment."""
    config = command.config()
    with common.held(OUT.value, folder.identity("landscape", FIELDS, config), results(config)) as (out, clock):
        model = common.load(config, clock)
        common.show(run(config, model, out, clock), out)


if __name__ == "__main__":
    OUT = flags.DEFINE_string("out", "runs/landscape", "folder for the results; an interrupted run goes on from there")
    command.run(main, Experiment("configs/landscape/smollm2_135m.py", FIELDS, check))
