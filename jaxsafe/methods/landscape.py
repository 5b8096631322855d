"""The safety landscape (arXiv 2405.17374): safety and capability at points of a line or a plane through the weights.

    random line   theta + a d            d random, each tensor as long as that of theta (`random_direction`)
    plane         theta + a d1 + b d2    d2 orthogonal to d1
    toward        theta + a (theta' - theta), the line to another model, at a = 1
    as far        theta + a d            d random, each tensor as long as that of theta' - theta: the control of toward

The paper takes d2 by Gram-Schmidt, its code only prints the cosine; here it is orthogonal in every tensor. The code
steps the weights from point to point; here each point is made from theta, so that no error adds up.

K directions, D seeds of directions, P points, n prompts
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool

from jaxsafe.chat.examinee import Examinee
from jaxsafe.chat.model import ChatModel
from jaxsafe.chat.stacked import Stacked
from jaxsafe.kernels.directions import Per, difference, moved, moved_stack, orthogonal, random_direction
from jaxsafe.model.transformer import Params
from jaxsafe.records.landscape import About
from jaxsafe.records.run import Json, Variant, plain
from jaxsafe.study.study import Study

ORIGIN = Variant("as it is", [], about=plain(About("origin")))
"""The model itself, at offset 0 of every slice."""

Kind = Literal["random", "plane", "toward", "as far"]
Offsets = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Slice:
    """Points of a line or a plane: offsets of each along its directions, which follow from the `seed`.

    `control` is the first random one of a line toward another model.
    """

    kind: Kind
    points: tuple[Offsets, ...]
    seed: int = 0
    control: "Slice | None" = None

    def name(self, point: Offsets) -> str:
        """The name of a point among those of other seeds, too."""
        return f"{self.group(point)}, draw {self.seed}" if self.kind in ("random", "as far") else self.group(point)

    def group(self, point: Offsets) -> str:
        """What points of other seeds share with it."""
        return f"{self.kind} {', '.join(f'{offset:+.3g}' for offset in point)}"


@dataclasses.dataclass(frozen=True)
class Ground:
    """What directions are made from: a model, how random ones are normalised, and another model of its shape."""

    model: ChatModel
    per: Per = "layer"
    other: ChatModel | None = None

    def __post_init__(self) -> None:
        if self.other is not None and self.other.config != self.model.config:
            raise ValueError(f"{self.other.name} is of another shape than {self.model.name}; no line joins the two")

    @property
    def goal(self) -> ChatModel:
        """The other model. Raises ValueError without one."""
        if self.other is None:
            raise ValueError("a line toward another model needs one; name it")
        return self.other

    def directions(self, along: Slice) -> tuple[Params, ...]:
        """The directions of a slice, one for each entry of its points. Raises ValueError without another model."""
        config, theta = self.model.config, self.model.params
        match along.kind:
            case "random":
                return (random_direction(config, theta, along.seed, self.per),)
            case "plane":
                first, second = (random_direction(config, theta, along.seed + k, self.per) for k in (0, 1))
                return first, orthogonal(config, second, first)
            case "toward":
                return (difference(theta, self.goal.params),)
            case "as far":
                way = difference(theta, self.goal.params)
                return (random_direction(config, way, along.seed, self.per, skip=()),)

    def follows(self, along: Slice, point: Offsets) -> Json:
        """What a point follows from: its offsets that are not 0, with what their directions are.

        So the first axis of a plane and the line of its seed are the same points, and all slices share the origin.
        """
        axes: list[list[Json]]
        match along.kind:
            case "random":
                axes = [[self.per, along.seed]]
            case "plane":
                axes = [[self.per, along.seed], [self.per, along.seed + 1, "orthogonal to", along.seed]]
            case "toward":
                axes = [["toward", self.goal.fingerprint()]]
            case "as far":
                axes = [["as far", self.goal.fingerprint(), self.per, along.seed]]
        return [[offset, *axis] for offset, axis in zip(point, axes, strict=True) if offset]

    def variant(self, along: Slice, point: Offsets) -> Variant:
        """A point as a variant of the model, against the model itself and the same point of its random control."""
        about = About(along.kind, point, control=along.kind == "as far")
        control = None if along.control is None else along.control.name(point)
        return Variant(
            along.name(point), self.follows(along, point), ORIGIN.name, control, along.group(point), plain(about)
        )


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which points there are.

    reach, steps: random lines go from -reach to reach in so many steps (the paper's 0.5 and 20); plane_steps: the same
    of a plane, 0 for none; draws: of random directions; toward: offsets on the line to another model; controls: random
    lines as far as that one; seed: of the first draw. Raises ValueError for an odd number of steps, which would leave
    out the model itself.
    """

    reach: float = 0.5
    steps: int = 20
    plane_steps: int = 0
    draws: int = 3
    toward: tuple[float, ...] = ()
    controls: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "plane_steps"):
            if (steps := getattr(self, name)) % 2:
                raise ValueError(f"{name} {steps} is odd, so no point is the model itself; give an even number")

    def line(self, steps: int) -> tuple[float, ...]:
        """Offsets from -reach to reach; exact multiples of the step, so that grids that share a point share it."""
        return tuple(self.reach * (2 * i - steps) / steps for i in range(steps + 1))

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Every line and plane, without the origin."""
        draws = range(self.seed, self.seed + self.draws) if self.steps else ()
        lines = [Slice("random", _single(self.line(self.steps)), draw) for draw in draws]
        if self.plane_steps:
            plane = itertools.product(self.line(self.plane_steps), repeat=2)
            lines.append(Slice("plane", tuple(point for point in plane if any(point)), self.seed))
        if self.toward:
            ways = _single(self.toward)
            far = [Slice("as far", ways, self.seed + k) for k in range(self.controls)]
            lines += [Slice("toward", ways, control=far[0] if far else None), *far]
        return tuple(lines)


def _single(offsets: Sequence[float]) -> tuple[Offsets, ...]:
    return tuple((float(offset),) for offset in offsets if offset)


def examine_slice(study: Study, ground: Ground, along: Slice, together: int = 1) -> None:
    """Examines the points of a slice, `together` of those that are left in one program, in the order of the points.

    Directions are made when they are needed.
    """
    directions = functools.cache(functools.partial(ground.directions, along))
    variants = {point: ground.variant(along, point) for point in along.points}
    for _, group in itertools.groupby(along.points, lambda point: study.has(variants[point])):
        points = list(group)
        for first in range(0, len(points), together):
            some = points[first : first + together]
            make = functools.partial(_placed, ground.model, directions, some)
            study.examine_together([variants[point] for point in some], make)


def _placed(model: ChatModel, directions: Callable[[], tuple[Params, ...]], points: Sequence[Offsets]) -> Examinee:
    """What answers for the model at `points`."""
    offsets = np.array(points, np.float32)
    if len(points) == 1:
        return model.with_params(moved(model.params, directions(), offsets[0])).steered([None])
    return Stacked(model, moved_stack(model.params, directions(), offsets))


def unsafe_answers(study: Study, along: Sequence[Slice]) -> Bool[np.ndarray, "D P n"]:
    """Answers to harmful prompts in which the judge sees no refusal, as papers count attack success, by random line.

    Points are in the order of their offsets, the model itself in the middle. Under the first setting; blank and broken
    answers count, as they do in the published code.
    """
    first = study.exam.settings[0].name

    def of(name: str) -> list[bool]:
        samples = study.examined[name].samples
        return [s.refused is not True for s in samples if s.setting == first and s.harmful]

    def line(one: Slice) -> list[list[bool]]:
        names = {point[0]: one.name(point) for point in one.points} | {0.0: ORIGIN.name}
        return [of(names[offset]) for offset in sorted(names)]

    return np.array([line(one) for one in along])
