"""What a run on brittleness has of its own (arXiv 2402.05162): where safety and utility meet in the weights."""

import dataclasses

from jaxsafe.records.run import Json


@dataclasses.dataclass(frozen=True)
class About:
    """A variant's columns in the table.

    family: the line of a plot that it belongs to; parameters: numbers of its method by name; sparsity: the share of
    the weights that are removed; ranks: removed from a map, the mean over maps. None where it removes no such thing.
    """

    family: str = "other"
    control: bool = False
    parameters: dict[str, Json] = dataclasses.field(default_factory=dict)
    sparsity: float | None = None
    ranks: float | None = None


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The Jaccard index of the top `fraction` of weights for safety and for utility, a number a layer, by map."""

    fraction: float
    values: dict[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Similarity:
    """How alike the first `rank` directions of safety and utility are, a number a layer, by map."""

    rank: int
    values: dict[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Energy:
    """The share of a map's output energy in its first `ranks`, the mean over layers, by map."""

    ranks: tuple[int, ...]
    safety: dict[str, tuple[float, ...]]
    utility: dict[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Details:
    """Of a run on brittleness.

    scored: rows that scores are made from, by side ("safety", "utility"); sparsity: shares of the weights that each
    variant removes, a number a layer, by map, by variant; noise: the share of maps whose ranks a variant cuts where
    float32 does not tell directions apart, by variant that does so.
    """

    scored: dict[str, int]
    sparsity: dict[str, dict[str, tuple[float, ...]]]
    overlap: Overlap | None = None
    similarity: Similarity | None = None
    energy: Energy | None = None
    noise: dict[str, float] = dataclasses.field(default_factory=dict)
