"""Brittleness of safety alignment (Wei et al., ICML 2024, arXiv 2402.05162): what to remove, and from what.

A point is one edit of the model: weights that matter to safety and not to utility, ranks that do, or a random choice
of the same size, its control. Material is what points are made from.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxsafe.kernels.importance import snip_scores, wanda_scores
from jaxsafe.kernels.lowrank import act_svd, random_bases, remove_orthogonal, remove_ranks, removed_ranks
from jaxsafe.kernels.selection import apply_mask, bottom, n_of_m, random_like, set_difference, top
from jaxsafe.methods.heads import head_mask
from jaxsafe.methods.sequential import Change
from jaxsafe.methods.statistics import Statistics
from jaxsafe.model.config import ModelConfig
from jaxsafe.model.transformer import Params
from jaxsafe.model.weights import flatten, linear_maps, nest

METHODS: Mapping[str, tuple[str, ...]] = {
    "set_difference": ("q", "p"),
    "top": ("fraction",),
    "bottom": ("fraction",),
    "n_of_m": ("n", "m"),
    "heads": ("k",),
    "orthogonal": ("r_s", "r_u"),
    "top_ranks": ("rank",),
    "bottom_ranks": ("rank",),
}
"""Method -> the numbers that it takes. Fractions are shares, ranks are counted out of the model's width."""
RANKS = ("orthogonal", "top_ranks", "bottom_ranks")
ONE_SIDED = ("top", "bottom", "n_of_m", "top_ranks", "bottom_ranks")
"""Methods that the safety data alone decide, and that can therefore go block by block."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One edit: a `method` with its numbers; `control` is the seed of its random counterpart, None for itself.

    Raises ValueError for an unknown method and for another count of numbers.
    """

    method: str
    values: tuple[float, ...] = ()
    control: int | None = None

    def __post_init__(self) -> None:
        if self.method == "dense":
            return
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is not known; use one of {', '.join(METHODS)}")
        if len(self.values) != len(METHODS[self.method]):
            raise ValueError(f"{self.method} takes {METHODS[self.method]}; got {self.values}")

    @property
    def parameters(self) -> dict[str, float]:
        """The numbers by name."""
        return dict(zip(METHODS.get(self.method, ()), self.values, strict=True))

    @property
    def of_ranks(self) -> bool:
        """Whether it removes ranks rather than weights."""
        return self.method in RANKS

    @property
    def name(self) -> str:
        """A name that tells it from every other point."""
        words = [self.method.replace("_", " "), *(f"{k}={v:g}" for k, v in self.parameters.items())]
        return " ".join(words if self.control is None else ["random for", *words, f"seed {self.control}"])

    @property
    def original(self) -> "Point":
        """What a control is the control of."""
        return dataclasses.replace(self, control=None)


DENSE = Point("dense")


def points(methods: Mapping[str, Any], controls: int) -> list[Point]:
    """The dense model, then every point of `methods` {method: its tuples of numbers}, each with its controls."""
    out = [DENSE]
    for method, grid in methods.items():
        for values in grid:
            numbers = tuple(values) if isinstance(values, tuple | list) else (values,)
            point = Point(method, numbers)
            out += [point, *(dataclasses.replace(point, control=seed) for seed in range(controls))]
    return out


@dataclasses.dataclass(frozen=True)
class Material:
    """What points are made from; each of the functions is called when a point needs it, and once.

    safety, utility: score trees (higher: matters more); safety_bases, utility_bases: trees of `Basis`; heads: the
    ranking of (layer, head); base: the weights that take the place of removed ones, None for zero; per: the
    group in which weights are compared. `sequential(kind, change)`, where it is given, applies a change block by
    block, each scored by `kind` on the model as changed below it; one-sided points of weights score by `score`.
    """

    config: ModelConfig
    params: Params
    safety: Callable[[], Any]
    utility: Callable[[], Any]
    safety_bases: Callable[[], Any]
    utility_bases: Callable[[], Any]
    heads: Callable[[], Any]
    base: Params | None = None
    per: str = "matrix"
    sequential: Callable[[str, Change], Params] | None = None
    score: str = "snip"


def once(make: Callable[[], Any]) -> Callable[[], Any]:
    """`make`, called at the first need and then remembered."""
    return functools.lru_cache(maxsize=1)(make)


def mask_of(material: Material, point: Point) -> dict[str, Any]:
    """The weights that a point removes: a boolean tree of the linear maps.

    A control removes as many weights of each matrix as its original, at random.
    """
    config, m, v = material.config, material, point.values
    match point.method:
        case "set_difference":
            mask = set_difference(config, m.safety(), m.utility(), v[0], v[1], m.per)
        case "heads":
            mask = head_mask(config, m.heads()[: int(v[0])])
        case _:
            mask = one_sided(config, m.safety(), point, m.per)
    return mask if point.control is None else random_like(config, mask, point.control)


def one_sided(config: ModelConfig, scores: Any, point: Point, per: str) -> dict[str, Any]:
    """The weights that a point of "top", "bottom" or "n_of_m" removes by `scores`. Raises ValueError for others."""
    match point.method, point.values:
        case "top", (fraction,):
            return top(config, scores, fraction, per)
        case "bottom", (fraction,):
            return bottom(config, scores, fraction, per)
        case "n_of_m", (n, m):
            return n_of_m(config, scores, int(n), int(m))
    raise ValueError(f"{point.method} removes no single weights by one score")


def block_by_block(material: Material, point: Point, apply: Callable[[str, Change], Params]) -> Params:
    """The parameters at a one-sided `point` whose blocks are scored on the model as changed below them.

    Source: Wanda (arXiv 2306.11695) and ActSVD as published (arXiv 2402.05162, appendix B).
    """

    def strip(config: ModelConfig, params: Params, found: Statistics) -> Params:
        bases = act_svd(config, params, found.sums)
        return remove_ranks(config, params, bases, int(point.values[0]), top=point.method == "top_ranks")

    def prune(config: ModelConfig, params: Params, found: Statistics) -> Params:
        make = snip_scores if material.score == "snip" else wanda_scores
        return apply_mask(params, one_sided(config, make(config, params, found.sums, found.n), point, material.per))

    return apply("gram", strip) if point.of_ranks else apply(material.score, prune)


def edited(material: Material, point: Point) -> tuple[Params, dict[str, Any] | None]:
    """The parameters at `point`, and the mask of removed weights where there is one.

    A control of ranks takes random directions, of the space that the map's outputs span, for the safety ones.
    """
    config, params, m = material.config, material.params, material
    if point.method == "dense":
        return params, None
    if m.sequential and point.control is None and point.method in ONE_SIDED:
        new = block_by_block(m, point, m.sequential)
        old, now = flatten(params), flatten(new)
        return new, None if point.of_ranks else nest({path: now[path] != old[path] for path in linear_maps(config)})
    if not point.of_ranks:
        mask = mask_of(material, point)
        return apply_mask(params, mask, m.base), mask
    safety, first = m.safety_bases(), int(point.values[0])
    if point.control is not None:
        needed = first if point.method == "top_ranks" else config.embed - first
        safety = random_bases(config, safety, point.control, needed)
    if point.method == "orthogonal":
        return remove_orthogonal(config, params, safety, m.utility_bases(), first, int(point.values[1])), None
    return remove_ranks(config, params, safety, first, top=point.method == "top_ranks"), None


def mean_ranks(config: ModelConfig, point: Point) -> float | None:
    """How many ranks a map loses at `point` at most, the mean over maps; None where it removes weights."""
    if not point.of_ranks:
        return None
    if point.method == "orthogonal":
        return float(np.mean(list(removed_ranks(config, int(point.values[0]), int(point.values[1])).values())))
    return float(np.mean(list(removed_ranks(config, config.embed - int(point.values[0]), config.embed).values())))


def family(point: Point, score: str) -> str:
    """The line of a plot that a point belongs to."""
    if point.method == "dense":
        return "dense"
    if point.control is not None:
        return "random ranks" if point.of_ranks else "random weights"
    return point.method.replace("_", " ") if point.of_ranks else f"{point.method.replace('_', ' ')} ({score})"
