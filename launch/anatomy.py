"""Where the safety of one model lives: its units, layers, weights, ranks and direction, and how far these agree.

python -m launch.anatomy --config=configs/anatomy/llama2_7b_chat.py --out=runs/llama2_anatomy --config.data=DATA_FOLDER
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict

from jaxsafe.chat.model import ChatModel
from jaxsafe.configs.anatomy.base import FIELDS
from jaxsafe.evaluation.judges.keyword import judge
from jaxsafe.methods.anatomy import (
    ReadSettings,
    UnitRoles,
    UnitSettings,
    described,
    parts_of,
    read_once,
    role_transfer_once,
    unit_roles_once,
)
from jaxsafe.methods.brittleness import SIDES, Material, Point, check_blocks, edited, points
from jaxsafe.methods.layer_scan import ScanSettings, safety_layers_once
from jaxsafe.methods.overlaps import located, overlaps
from jaxsafe.methods.part_variants import direction_variants, unit_variants
from jaxsafe.methods.refusal_direction import Direction, Search
from jaxsafe.methods.ssah import RoleShares
from jaxsafe.model.layers import LayerRange
from jaxsafe.prompts.roles import Roles
from jaxsafe.records.anatomy import Details, Gap, RoleTransfer
from jaxsafe.records.attack import LayerScan
from jaxsafe.records.run import Run
from jaxsafe.rows import Row
from jaxsafe.study.study import Study

from . import command, common, folder
from .progress import Clock
from .settings import Experiment

READ = ("malicious", "normal")
SCANNED = "over_refusal"


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that contradict each other, FileNotFoundError for what is not there."""
    common.check(config)
    common.check_scored(config)
    for point in points_of(config):
        check_blocks(common.score_settings(config), point, bool(config.base_model))
    if config.layer_alpha == 1:
        raise ValueError("config.layer_alpha 1.0 scales nothing; need another factor, such as 1.2")
    roles_of(config)


def points_of(config: ConfigDict) -> list[Point]:
    """The dense model, without weights and without ranks of safety, each with its controls."""
    grid = {"set_difference": (tuple(config.weights),), "orthogonal": (tuple(config.ranks),)}
    return points(grid, config.controls)


def roles_of(config: ConfigDict) -> Roles:
    """Prompt sets by role, each prompt in one: scored, read, scanned for layers, and evaluated."""
    return common.scored_roles(config, (*READ, SCANNED))


def results(config: ConfigDict) -> int:
    """How many results the experiment has."""
    return len(points_of(config)) + (len(config.prune) + 1) * (1 + config.controls)


def run(config: ConfigDict, model: ChatModel, out: pathlib.Path, clock: Clock) -> Run:
    """The whole experiment; what it finds is in `out` and in the returned record."""
    common.check_ranks(config, ["ranks"], model)
    roles = roles_of(config)
    exam = common.exam(config, model, common.evaluated(roles), common.settings(config))
    study = Study(out, model, exam, clock.watch("exam_s"))
    study.check()
    material = common.material(config, model, roles, study.store, clock)
    rows = {side: material.rows(side) for side in SIDES}

    how = UnitSettings(RoleShares(*config.unit_shares), config.as_coded, config.score_batch_size)
    with clock.watch("scores_s")("roles of units", sum(map(len, rows.values()))) as done:
        units = unit_roles_once(study.store, model, rows, how, done)
    transfer = transferred(config, study, units, rows, how, clock)
    gap, direction = read(config, material, roles, clock)
    scan = scanned(config, study, roles, gap, clock)

    for point in points_of(config):
        make = functools.partial(changed, material, point)
        study.examine(point.variant(material, config.controls), make)
    for role in config.prune:
        for variant, pruned in unit_variants(model, units, role, config.controls):
            study.examine(variant, pruned)
    for variant, ablated in direction_variants(model, direction, config.controls):
        study.examine(variant, ablated)

    _, weights, ranks = (point for point in points_of(config) if point.control is None)
    parts = parts_of(material, weights, ranks, units, direction)
    with clock.watch("overlaps_s")("random parts", 2 * config.draws) as done:
        agreement = overlaps(model.config, model.params, parts, config.draws, config.seed, done)
    layers = scan.layers if scan else gap.layers
    where = located(model.config, parts, layers) if layers else ()
    scored = {side: len(rows[side]) for side in SIDES}
    details = Details(scored, units.counts, gap, scan, layers, described(direction), agreement, where, transfer)
    return common.finish(study, "anatomy", config, roles, clock, details)


def changed(material: Material, point: Point) -> ChatModel:
    """The material's model after the edit."""
    return material.model.with_params(edited(material, point)[0])


def transferred(
    config: ConfigDict,
    study: Study,
    units: UnitRoles,
    rows: Mapping[str, Sequence[Row]],
    how: UnitSettings,
    clock: Clock,
) -> RoleTransfer | None:
    """How roles change in the other model, where the config names one. Raises ValueError for another shape."""
    other = common.beside(config.other_model, study.model)
    if other is None:
        return None
    with clock.watch("scores_s")(f"roles of units in {config.other_model}", 0):
        return role_transfer_once(study.store, study.model, units, other, rows, how)


def search_of(config: ConfigDict) -> Search:
    """How the refusal direction is chosen."""
    return Search(kl=config.kl, validation=config.candidate_prompts, batch_size=config.batch_size)


def read(config: ConfigDict, material: Material, roles: Roles, clock: Clock) -> tuple[Gap, Direction]:
    """What the layers tell apart, and the refusal direction; kept in the store."""
    prompts = {kind: [prompt for each in roles[kind] for prompt in each.prompts] for kind in READ}
    rows = {side: material.rows(side) for side in SIDES}
    how = ReadSettings(config.triples, config.candidate_positions, search_of(config), config.seed)
    tried = sum(min(config.candidate_prompts, len(each) // 2) for each in prompts.values())
    with clock.watch("read_s")("gap and direction", sum(map(len, prompts.values())) + tried) as done:
        return read_once(material.store, material.model, prompts, rows, how, done)


def scanned(config: ConfigDict, study: Study, roles: Roles, gap: Gap, clock: Clock) -> LayerScan | None:
    """The range of layers found by scaling, from where the gap opens; None where the config names no prompts."""
    prompts = [prompt for each in roles[SCANNED] for prompt in each.prompts]
    if not prompts:
        return None
    L = study.model.config.layers
    start = gap.layers or LayerRange(L // 5, max(L // 5 + 1, 2 * L // 5))
    how = ScanSettings(start, config.layer_alpha, config.layer_tokens, config.batch_size)
    with clock.watch("layers_s")("layers by scaling", len(prompts) * (1 + 2 * L - start.first)) as done:
        return safety_layers_once(study.store, study.model, prompts, judge(config.judge), how, done)


def main() -> None:
    """Reads the flags and runs the experiment."""
    config = command.config()
    with common.held(OUT.value, folder.identity("anatomy", FIELDS, config), results(config)) as (out, clock):
        model = common.load(config, clock)
        common.show(run(config, model, out, clock), out)


if __name__ == "__main__":
    OUT = flags.DEFINE_string("out", "runs/anatomy", "folder for the results; an interrupted run goes on from there")
    command.run(main, Experiment("configs/anatomy/smollm2_135m.py", FIELDS, check))
