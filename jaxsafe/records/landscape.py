"""What a run through the safety landscape has of its own (arXiv 2405.17374)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class About:
    """A variant's columns in the table.

    line: the slice that the point is of: "origin", "random", "plane", "toward" (another model) or "as far" (its
    random control); offsets: along its directions, one of a line and two of a plane.
    """

    line: str
    offsets: tuple[float, ...] = ()
    control: bool = False


@dataclasses.dataclass(frozen=True)
class Visage:
    """The depth of the safety basin by one definition, in [0, 1] (papers print it times 100).

    definition: "paper" or "code" (see `methods.visage`); value, ci_low, ci_high: the mean over directions with its 95%
    interval over directions and prompts; by_direction: that of each. None where there is none.
    """

    definition: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    by_direction: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class Details:
    """Of a run through the landscape.

    prompts: how many harmful ones VISAGE is of; visage: by definition, of the random lines, none without them; other:
    the model that a line leads to; distance: how far it is, as a share of the norm of the weights.
    """

    prompts: int
    visage: tuple[Visage, ...] = ()
    other: str | None = None
    distance: float | None = None
