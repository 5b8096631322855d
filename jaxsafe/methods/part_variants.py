"""Variants of a model without a part of it, each beside random parts of the same size: units, a direction.

D embed
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from jaxsafe.chat.model import ChatModel
from jaxsafe.digest import arrays_sha256
from jaxsafe.io.store import Json
from jaxsafe.kernels.selection import sparsity
from jaxsafe.methods.anatomy import UnitRoles
from jaxsafe.methods.brittleness import DENSE
from jaxsafe.methods.overlaps import unit_weights
from jaxsafe.methods.refusal_direction import Direction, ablated
from jaxsafe.methods.ssah import Role, random_units, units_of, without_units
from jaxsafe.records.brittleness import About
from jaxsafe.records.run import Variant, plain

Made = tuple[Variant, Callable[[], ChatModel]]
"""A variant, and what makes its model when it is needed."""


def unit_variants(model: ChatModel, units: UnitRoles, role: str, controls: int) -> Iterator[Made]:
    """The model without the units of a role, and without as many random heads and neurons of each layer.

    Each has its mean input on safety data in the place of what is pruned, as published (arXiv 2410.10862).
    """
    pruned = units_of(units.roles, Role[role.upper()])
    share = sparsity(unit_weights(model.config, pruned))
    follows, name = [*units.follows, role], f"{role} units"
    variant = _variant(name, follows, About(name, sparsity=share), controls)
    yield variant, functools.partial(without_units, model, pruned, units.moments)
    for seed in range(controls):
        control = _control(name, seed, follows, About("random units", True, sparsity=share))
        yield control, functools.partial(without_units, model, random_units(pruned, seed), units.moments)


def direction_variants(model: ChatModel, direction: Direction, controls: int) -> Iterator[Made]:
    """The model whose stream has no part along the refusal direction (arXiv 2406.11717), and along random ones."""
    follows, name = ["direction", arrays_sha256([direction.vector])], "refusal direction"
    yield _variant(name, follows, About(name), controls), functools.partial(ablated, direction.vector, model)
    for seed in range(controls):
        normal = np.random.default_rng(seed).standard_normal(len(direction.vector)).astype(np.float32)
        control = _control(name, seed, follows, About("random direction", True))
        yield control, functools.partial(ablated, normal / np.linalg.norm(normal), model)


def _variant(name: str, follows: Json, about: About, controls: int) -> Variant:
    control = f"random for {name} seed 0" if controls else None
    return Variant(name, follows, DENSE.name, control, name, plain(about))


def _control(name: str, seed: int, follows: Json, about: About) -> Variant:
    group = f"random for {name}"
    return Variant(f"{group} seed {seed}", [follows, "random", seed], DENSE.name, None, group, plain(about))
