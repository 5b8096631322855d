"""Where the safety of one model lives: its units, what its layers tell apart, its refusal direction, and variants.

SSAH (arXiv 2410.10862), Safety Layers (arXiv 2408.17003) and the refusal direction (arXiv 2406.11717), each made once
of the same two sides. "safety" and "utility" are rows of refusals and of answers; "malicious" and "normal" are prompts.

n prompts, P positions, L layers, D embed
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsafe.chat.model import ChatModel
from jaxsafe.digest import arrays_sha256
from jaxsafe.io.store import TREE, Json, Store
from jaxsafe.kernels.ablation import ablation
from jaxsafe.kernels.selection import sparsity
from jaxsafe.kernels.units import Units
from jaxsafe.methods.brittleness import DENSE, SIDES
from jaxsafe.methods.layer_gaps import gap_curve
from jaxsafe.methods.overlaps import unit_weights
from jaxsafe.methods.refusal_direction import (
    Direction,
    Search,
    choose_direction,
    end_states,
    openings,
    template_positions,
)
from jaxsafe.methods.ssah import Role, RoleShares, random_units, unit_roles, unit_scores, units_of, without_units
from jaxsafe.methods.unit_inputs import INPUTS, InputMoments, input_moments
from jaxsafe.progress import Progress, silent
from jaxsafe.records.anatomy import Gap, RefusalDirection, RoleCount
from jaxsafe.records.brittleness import About
from jaxsafe.records.run import Variant, from_json, plain
from jaxsafe.rows import Row, data_sha256

ROLES = tuple(role.name.lower() for role in Role)
Made = tuple[Variant, Callable[[], ChatModel]]
"""A variant, and what makes its model when it is needed."""


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

    follows: what the roles follow from besides the model.
    """

    roles: Units
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
    found = {}
    data = {side: data_sha256(rows[side]) for side in SIDES}
    for side in SIDES:

        def make(side: str = side) -> dict[str, dict[str, np.ndarray]]:
            moments = input_moments(model, rows[side], how.as_coded, how.batch_size, done)
            return {"mean": dict(moments.mean), "variance": dict(moments.variance)}

        kept = store.once("moments", [model.fingerprint(), data[side], how.as_coded], make, TREE)
        wide = {of: {tap: np.asarray(kept[of][tap], np.float64) for tap in INPUTS.values()} for of in kept}
        found[side] = InputMoments(wide["mean"], wide["variance"])
    safety, utility = (unit_scores(model.config, model.params, found[side]) for side in SIDES)
    follows = ["units", data, plain(how.shares), how.as_coded]
    return UnitRoles(unit_roles(model.config, safety, utility, how.shares), found[SIDES[0]], follows)


def unit_variants(model: ChatModel, found: UnitRoles, role: str, controls: int) -> Iterator[Made]:
    """The model without the units of a role, and without as many random heads and neurons of each layer.

    Each has its mean input in the place of what is pruned.
    """
    units = units_of(found.roles, Role[role.upper()])
    share = sparsity(unit_weights(model.config, units))
    follows, name = [*found.follows, role], f"{role} units"
    variant = _variant(name, follows, About(name, sparsity=share), controls)
    yield variant, functools.partial(without_units, model, units, found.moments)
    for seed in range(controls):
        control = _control(name, seed, follows, About("random units", True, sparsity=share))
        yield control, functools.partial(without_units, model, random_units(units, seed), found.moments)


def direction_variants(model: ChatModel, direction: Direction, controls: int) -> Iterator[Made]:
    """The model whose stream has no part along the refusal direction, and along random ones."""
    follows, name = ["direction", arrays_sha256([direction.vector])], "refusal direction"
    yield _variant(name, follows, About(name), controls), functools.partial(_ablated, model, direction.vector)
    for seed in range(controls):
        drawn = np.random.default_rng(seed).standard_normal(len(direction.vector)).astype(np.float32)
        control = _control(name, seed, follows, About("random direction", True))
        yield control, functools.partial(_ablated, model, drawn / np.linalg.norm(drawn))


def _ablated(model: ChatModel, vector: Float[np.ndarray, " D"]) -> ChatModel:
    return model.with_edits(ablation(model.config, model.params, jnp.asarray(vector)))


def _variant(name: str, follows: Json, about: About, controls: int) -> Variant:
    control = f"random for {name} seed 0" if controls else None
    return Variant(name, follows, DENSE.name, control, name, plain(about))


def _control(name: str, seed: int, follows: Json, about: About) -> Variant:
    group = f"random for {name}"
    return Variant(f"{group} seed {seed}", [follows, "random", seed], DENSE.name, None, group, plain(about))


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
        return {"gap": plain(gap), "direction": plain(chosen)}

    asked = [data_sha256(model.rows(each)) for each in kinds]
    limits = {name: value for name, value in plain(how.search).items() if name != "batch_size"}
    follows = [model.fingerprint(), asked, [refusals.tolist(), answers.tolist()], how.triples, how.positions, limits]
    kept = store.once("read", [*follows, how.seed], make)
    chosen = kept["direction"] | {"vector": np.array(kept["direction"]["vector"], np.float32)}
    return from_json(kept["gap"], Gap), Direction(**chosen)


def described(direction: Direction, search: Search) -> RefusalDirection:
    """The direction as the record has it."""
    allowed = direction.kl <= search.kl and direction.induce >= search.induced
    numbers = direction.bypass, direction.induce, direction.kl
    return RefusalDirection(direction.layer, direction.position, *numbers, allowed)
