"""Where the safety of one model lives: roles of its units, what its layers tell apart, and its refusal direction.

SSAH (arXiv 2410.10862), Safety Layers (arXiv 2408.17003) and the refusal direction (arXiv 2406.11717), each made once
of the same two sides. "safety" and "utility" are rows of refusals and of answers; "malicious" and "normal" are prompts.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jaxsafe.chat.model import ChatModel
from jaxsafe.io.store import TREE, Json, Store
from jaxsafe.kernels.ablation import written_directions
from jaxsafe.kernels.lowrank import kept
from jaxsafe.kernels.units import Units
from jaxsafe.methods.brittleness import SIDES, Material, Point, mask_of
from jaxsafe.methods.layer_gaps import gap_curve
from jaxsafe.methods.overlaps import PATHS, Parts, leading, outside
from jaxsafe.methods.refusal_direction import (
    Direction,
    Search,
    choose_direction,
    end_states,
    openings,
    template_positions,
)
from jaxsafe.methods.ssah import Role, RoleShares, role_transfer, unit_roles, unit_scores, units_of
from jaxsafe.methods.unit_inputs import INPUTS, InputMoments, input_moments
from jaxsafe.model.weights import flatten
from jaxsafe.progress import Progress, silent
from jaxsafe.records.anatomy import Gap, RefusalDirection, RoleCount, RoleTransfer
from jaxsafe.records.run import from_json, plain
from jaxsafe.rows import Row, data_sha256

ROLES = tuple(role.name.lower() for role in Role)


@dataclasses.dataclass(frozen=True)
class UnitSettings:
    """How units get their roles: the published shares, and whether variances are as their code estimates them."""

    shares: RoleShares = dataclasses.field(default_factory=RoleShares)
    as_coded: bool = False
    batch_size: int = 16


@dataclasses.dataclass(frozen=True)
class ReadSettings:
    """How prompts are read: `triples` of them for the gap, candidates for the direction at the last `positions`."""

    triples: int = 500
    positions: int = 8
    search: Search = Search()
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class UnitRoles:
    """The role of every unit, and the inputs on safety data whose means stand in for pruned units.

    scores: of every unit on safety data; follows: what the roles follow from besides the model.
    """

    roles: Units
    scores: Units
    moments: InputMoments
    follows: Json

    @property
    def counts(self) -> tuple[RoleCount, ...]:
        """The units of each role."""
        every = self.roles.heads.size + self.roles.neurons.size
        chosen = {role: units_of(self.roles, role) for role in Role}
        return tuple(
            RoleCount(
                role.name.lower(),
                int(units.heads.sum()),
                int(units.neurons.sum()),
                float((units.heads.sum() + units.neurons.sum()) / every),
                tuple(map(int, units.heads.sum(1) + units.neurons.sum(1))),
            )
            for role, units in chosen.items()
        )


def unit_roles_once(
    store: Store, model: ChatModel, rows: Mapping[str, Sequence[Row]], how: UnitSettings, done: Progress = silent
) -> UnitRoles:
    """The roles by the `rows` of both sides; their moments are kept in `store`. `done` is called with rows."""
    data = {side: data_sha256(rows[side]) for side in SIDES}
    moments = {}
    for side in SIDES:

        def make(side: str = side) -> dict[str, dict[str, np.ndarray]]:
            read = input_moments(model, rows[side], how.as_coded, how.batch_size, done)
            return {"mean": dict(read.mean), "variance": dict(read.variance)}

        stored = store.once("moments", [model.fingerprint(), data[side], how.as_coded], make, TREE)
        wide = {of: {tap: np.asarray(stored[of][tap], np.float64) for tap in INPUTS.values()} for of in stored}
        moments[side] = InputMoments(wide["mean"], wide["variance"])
    safety, utility = (unit_scores(model.config, model.params, moments[side]) for side in SIDES)
    follows = ["units", data, plain(how.shares), how.as_coded]
    return UnitRoles(unit_roles(model.config, safety, utility, how.shares), safety, moments["safety"], follows)


def role_transfer_once(
    store: Store,
    model: ChatModel,
    units: UnitRoles,
    other: ChatModel,
    rows: Mapping[str, Sequence[Row]],
    how: UnitSettings,
) -> RoleTransfer:
    """How the roles `units` of `model` change in the `other` one, by the same `rows` of both sides.

    The control is ours: `model` by every second row, and by the rows between. Raises ValueError for another shape.
    """
    if other.config != model.config:
        raise ValueError(f"{other.name} is of another shape than {model.name}; its units have no role to compare")
    halves = [{side: rows[side][k::2] for side in SIDES} for k in (0, 1)]
    first, second = (unit_roles_once(store, model, half, how).roles for half in halves)
    after = unit_roles_once(store, other, rows, how).roles
    pairs = (role_transfer(units.roles, after), role_transfer(first, second))
    return RoleTransfer(other.name, *(tuple(map(tuple, counts.tolist())) for counts in pairs))


def read_once(
    store: Store,
    model: ChatModel,
    prompts: Mapping[str, Sequence[str]],
    rows: Mapping[str, Sequence[Row]],
    how: ReadSettings,
    done: Progress = silent,
) -> tuple[Gap, Direction]:
    """The gap between "malicious" and "normal" `prompts` by layer, and the refusal direction; kept in `store`.

    Every second prompt makes the candidates for the direction, the others choose among them by the tokens that the
    refusals among `rows` open with. `done` is called with numbers of prompts. Raises ValueError for fewer than two
    prompts of a kind, and where refusals open with no token of their own.
    """
    kinds = [list(prompts[kind]) for kind in ("malicious", "normal")]
    if min(map(len, kinds)) < 2:
        raise ValueError(f"{len(kinds[0])} malicious and {len(kinds[1])} normal prompts; need at least 2 of each")
    refusals, answers = (np.array([row.ids[row.instruction_end + 1] for row in rows[side]], int) for side in SIDES)

    def make() -> Json:
        tokens = openings(refusals, answers)
        size = how.search.batch_size
        positions = min(template_positions(model.rows([*kinds[0], *kinds[1]])), how.positions)
        malicious, normal = (end_states(model, each, positions, size, done) for each in kinds)
        gap = gap_curve(normal[:, 0], malicious[:, 0], how.triples, how.seed)
        candidates = malicious[::2].mean(0) - normal[::2].mean(0)
        chosen = choose_direction(model, candidates, kinds[0][1::2], kinds[1][1::2], tokens, how.search, done)
        return {"gap": plain(gap), "direction": chosen.stored()}

    asked = [data_sha256(model.rows(each)) for each in kinds]
    limits = {name: value for name, value in plain(how.search).items() if name != "batch_size"}
    follows = [model.fingerprint(), asked, [refusals.tolist(), answers.tolist()], how.triples, how.positions, limits]
    stored = store.once("read", [*follows, how.seed], make)
    return from_json(stored["gap"], Gap), Direction.of(stored["direction"])


def parts_of(material: Material, weights: Point, ranks: Point, units: UnitRoles, direction: Direction) -> Parts:
    """What each attribution names: `weights` is a point of weights, `ranks` one of orthogonal ranks (r_s, r_u)."""
    config = material.config
    safety, utility = (material.bases(side) for side in SIDES)
    r_s, r_u = map(int, ranks.values)
    known = {path: flatten(safety)[path].vectors.shape[-1] for path in PATHS}
    counts = {path: (int(kept(config, R, r_s)), int(kept(config, R, r_u))) for path, R in known.items()}
    written = written_directions(config, material.params, jnp.asarray(direction.vector))
    return Parts(
        mask_of(material, weights),
        units_of(units.roles, Role.SAFETY),
        outside(safety, utility, counts),
        leading(utility, {path: of_safety for path, (of_safety, _) in counts.items()}),
        {path: written[path.split("/")[-1]] for path in PATHS},
    )


def described(direction: Direction) -> RefusalDirection:
    """The direction as the record has it."""
    numbers = direction.bypass, direction.induce, direction.kl
    return RefusalDirection(direction.layer, direction.position, *numbers, direction.allowed)
